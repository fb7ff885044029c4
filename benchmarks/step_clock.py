"""Times the steps of transformers' `Trainer`, and so of TRL's trainers."""

import sys
import time

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, which include sampling wherever it happens.

    Each is printed as soon as it is known.
    """

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.tokens: list[float] = []

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._mark()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self._mark()
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.3g} s", file=sys.stderr, flush=True)

    def on_log(self, *args: object, logs: dict[str, float], **kwargs: object) -> None:
        if "completions/mean_length" in logs:
            self.tokens.append(float(logs["completions/mean_length"]))

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
