"""Sampling ahead: while the trainer works on a step, engines elsewhere sample the next ones."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dppo_cli.rollout.collect import Collected, Generated, InStepCollector, Take
from dppo_cli.types import Prompt


@dataclass(frozen=True)
class Begun:
    """A step that is being sampled."""

    step: int
    prompts: Sequence[Prompt]
    generated: Generated


class AheadCollector:
    """Begins to sample a step `ahead` steps before the trainer asks for it, with the policy as it is then.

    So a group that step t trains on is of version t - 1 - s with a staleness s of at most `ahead`: of fewer at the
    start of a run and of one that goes on, which has nothing begun. Its engine's `generate` has to begin when it is
    called, and to keep to the version it began with.
    """

    def __init__(self, collector: InStepCollector, peek: Take, ahead: int, last: int) -> None:
        """`peek`: gives prompts that `take` will give, in the same order. `last`: the last step of the run."""
        self.collector, self.peek, self.ahead, self.last = collector, peek, ahead, last
        self.begun: deque[Begun] = deque()

    def collect(self, take: Take, step: int) -> Collected:
        count = self.collector.batch.prompts_per_step
        following = self.begun[-1].step + 1 if self.begun else step
        for later in range(following, min(step + self.ahead, self.last) + 1):
            prompts = self.peek(count)
            self.begun.append(Begun(later, prompts, self.collector.begin(prompts, later)))
        now = self.begun.popleft()
        taken = take(count)
        assert now.step == step and all(one is other for one, other in zip(now.prompts, taken, strict=True))
        seconds: dict[str, float] = {}
        return Collected(self.collector.groups(now.prompts, now.generated, seconds), seconds, waited=False)
