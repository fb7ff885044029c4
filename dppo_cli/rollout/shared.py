"""Sampling in several processes: each has an engine of its own, and a share of the prompts."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from dppo_cli.config.sections import Sampling
from dppo_cli.processes.crew import Crew
from dppo_cli.rollout.engine import RolloutEngine
from dppo_cli.types import Completion, Prompt


class SharedEngine:
    """See `RolloutEngine`. `engine`: of this process; the workers answer to `sync` and `generate` with theirs.

    Tokens do not depend on the number of processes, but for rounding: each prompt keeps its own random numbers.
    """

    def __init__(self, engine: RolloutEngine, crew: Crew) -> None:
        self.engine, self.crew = engine, crew

    def __enter__(self) -> "SharedEngine":
        self.engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.__exit__(None, None, None)

    @property
    def samples_with(self) -> str:
        return f"{self.engine.samples_with}; in {self.crew.size} processes"

    def sync(self, version: int) -> None:
        self.crew.begin_all("sync", version)
        self.engine.sync(version)
        self.crew.ended()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        numbers = range(len(prompts)) if numbers is None else numbers
        own, *others = slices(len(prompts), self.crew.size)
        how = (samples_per_prompt, sampling, num_logprobs, seed)
        self.crew.begin("generate", [(of.start, prompts[of], *how, numbers[of]) for of in others])
        for found in self.engine.generate(prompts[own], *how, numbers[own]):
            yield found
            yield from self.crew.parts(0)
        yield from self.crew.parts(None)
        self.crew.ended()


def slices(count: int, parts: int) -> list[slice]:
    """`count` things in `parts` runs of nearly equal length, the longer ones first.

    Example:
        >>> slices(5, 2)
        [slice(0, 3, None), slice(3, 5, None)]
    """
    ends = [-(-count * part // parts) for part in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
