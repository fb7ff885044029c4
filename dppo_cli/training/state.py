"""The state of a run: everything that a resume needs.

A run is a function from state to state, so one that was stopped and goes on from a snapshot equals an undisturbed one.
Rollouts and the order of mini-batches need no state of their own: their seeds follow from the run's seed and the step.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dppo_cli.errors import RunError
from dppo_cli.kernels.devices import random_state, set_random_state
from dppo_cli.training.evaluation import Measured, check_measured
from dppo_cli.training.files import as_count, as_number
from dppo_cli.training.order import PromptOrder
from dppo_cli.training.trainer import Trainer

CENTURY = 100 * 365.25 * 24 * 3600
"""In seconds. No run takes longer."""


class Tally(Protocol):
    """What a listener has counted so far, as JSON."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """A `RunState` as tensors, for safetensors, and everything else, for JSON."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


@dataclass
class RunState:
    """A run after `step` steps.

    A step changes weights, random states and the data cursor before it is finished; `rewind()` undoes what an
    unfinished step has changed.
    """

    learner: Trainer
    prompts: PromptOrder
    tallies: Mapping[str, Tally]
    fingerprint: str | None = None  # of the problems that `prompts` takes from; None: not known
    most_prompts: int = sys.maxsize  # that a step takes
    step: int = 0
    seconds: float = 0.0  # of processes that ended before this one
    before: dict[str, Measured] | None = None  # the evaluations before the first step, by set
    best: tuple[int, float] | None = None  # step and accuracy of the best evaluation in between
    warnings: list[str] = field(default_factory=list)
    mark: Snapshot | None = field(default=None, init=False)  # before the step in progress

    def begin_step(self) -> None:
        """Remember what the step will change."""
        self.mark = self._changing()

    def is_best(self, accuracy: float | None) -> bool:
        """Whether an evaluation in between is better than all before."""
        return accuracy is not None and (self.best is None or accuracy > self.best[1])

    def finish_step(self, accuracy: float | None = None) -> None:
        """`accuracy`: of the evaluation after this step, if there was one."""
        self.step += 1
        self.mark = None
        if accuracy is not None and self.is_best(accuracy):
            self.best = (self.step, accuracy)

    def rewind(self) -> None:
        """Undo a step that has begun and is not finished."""
        if self.mark is not None:
            self._restore(self.mark)
            self.mark = None

    def snapshot(self) -> Snapshot:
        """A copy that later steps do not change."""
        assert self.mark is None, "a step is in progress"
        changing = self._changing()
        plain = {
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "fingerprint": self.fingerprint,
            "best": self.best,
            "warnings": list(self.warnings),
            "tallies": {name: tally.state() for name, tally in self.tallies.items()},
        }
        return Snapshot(changing.tensors, {**plain, **changing.plain})

    def load(self, snapshot: Snapshot) -> None:
        """Become the state that `snapshot` was taken of, in a run of the same config. Raises RunError for any other."""
        try:
            self._load(snapshot)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise RunError(
                f"the checkpoint of step {snapshot.plain.get('step')} is of another run: {error!r}"
            ) from error

    def _load(self, snapshot: Snapshot) -> None:
        plain = snapshot.plain
        self.step, self.seconds = as_count(plain["step"]), as_number(plain["seconds"])
        if not 0 <= self.seconds <= CENTURY:
            raise ValueError(f"seconds is {self.seconds}")
        self.before = plain["before"]
        if self.before is not None:
            check_measured(self.before)
        if not isinstance(plain.get("fingerprint"), str | None):
            raise TypeError("the fingerprint is no text")
        best, taken = plain["best"], as_count(plain["prompts"]["taken"])
        self.best = None if best is None else (as_count(best[0]), as_number(best[1]))
        self.warnings = list(map(str, plain["warnings"]))
        if taken > self.step * self.most_prompts:  # They would be drawn again, one round after the other.
            raise ValueError(f"{taken} prompts in {self.step} steps")
        for name, tally in self.tallies.items():
            tally.load_state(plain["tallies"][name])
        self._restore(snapshot)

    def _changing(self) -> Snapshot:
        tensors, learner = self.learner.state()
        tensors |= {"random.cpu": torch.get_rng_state()}
        device = self.learner.policy.device
        of_device = random_state(device)
        if of_device is not None:
            tensors |= {"random.device": of_device}
        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        return Snapshot(copies, {"prompts": self.prompts.state(), "learner": learner})

    def _restore(self, snapshot: Snapshot) -> None:
        tensors = dict(snapshot.tensors)
        for name, tensor in tensors.items():
            if tensor.is_complex() or not tensor.isfinite().all():
                raise TypeError(f"{name} is complex or not finite")
        random_states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random.")}
        self.learner.load_state(tensors, snapshot.plain["learner"])
        self.prompts.load_state(snapshot.plain["prompts"])
        torch.set_rng_state(random_states["random.cpu"])
        set_random_state(self.learner.policy.device, random_states.get("random.device"))
