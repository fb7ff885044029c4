"""Sampling ahead: which prompts, with which version, how far."""

from collections.abc import Iterator, Sequence

import make
import pytest

from dppo_cli.algorithm.advantage import GroupMean
from dppo_cli.config.sections import BatchPlan, Sampling
from dppo_cli.rollout.ahead import AheadCollector
from dppo_cli.rollout.collect import InStepCollector
from dppo_cli.rollout.engine import derive_seed
from dppo_cli.training.order import LookAhead, Shuffled
from dppo_cli.types import Completion, Prompt, Score

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=8, stop=[])
PROMPTS = [make.prompt(i) for i in range(5)]


class Elsewhere:
    """An engine whose `generate` begins when it is called. `begun`: seed and version of each call."""

    def __init__(self) -> None:
        self.version = 0
        self.begun: list[tuple[int, int]] = []

    def generate(
        self, prompts: Sequence[Prompt], count: int, how: Sampling, k: int, seed: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.begun.append((seed, self.version))
        made = make.completion((len(self.begun),))
        return (
            (n, [Completion(made.token_ids_T, made.sampled_T, made.mu, "", made.status, (version,))] * count)
            for version in [self.version]
            for n in range(len(prompts))
        )


def scorer(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
    return [[Score(float(i)) for i in range(len(row))] for row in completions]


def run(ahead: int, steps: int, last: int, order: LookAhead | None = None, first: int = 1) -> tuple[list, Elsewhere]:
    """Prompts and versions of each step, as the loop would have them."""
    engine, order = Elsewhere(), order or LookAhead(Shuffled(PROMPTS, seed=2))
    engine.version = first - 1
    inner = InStepCollector(engine, scorer, GroupMean(), BatchPlan(2, 3, 1, 1), SAMPLING, 0, 9, False)
    collector = AheadCollector(inner, order.peek, ahead, last)
    found = []
    for step in range(first, first + steps):
        collected = collector.collect(order.take, step)
        assert not collected.waited and set(collected.seconds) == {"rollout", "reward"}
        versions = {v for group in collected.groups for c in group.completions for v in c.versions}
        assert all(group.advantages == [-1.0, 0.0, 1.0] for group in collected.groups)
        found.append(([group.prompt.index for group in collected.groups], versions))
        engine.version = step
    return found, engine


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_steps_have_their_prompts_and_seeds_and_older_versions(ahead) -> None:
    in_step = Shuffled(PROMPTS, seed=2)
    found, engine = run(ahead, steps=8, last=8)
    for step, (prompts, versions) in enumerate(found, 1):
        assert prompts == [prompt.index for prompt in in_step.take(2)]
        assert versions == {max(0, step - 1 - ahead)}
    assert [seed for seed, _ in engine.begun] == [derive_seed(9, step) for step in range(1, 9)]


def test_nothing_is_begun_after_the_last_step() -> None:
    _, engine = run(ahead=2, steps=4, last=4)
    assert len(engine.begun) == 4
    _, engine = run(ahead=2, steps=3, last=4)
    assert len(engine.begun) == 4


def test_a_run_that_goes_on_begins_anew() -> None:
    """The prompts that were begun and not trained on come again, with the policy as it is."""
    order = LookAhead(Shuffled(PROMPTS, seed=2))
    whole, _ = run(ahead=1, steps=6, last=6)
    first, _ = run(ahead=1, steps=3, last=6, order=order)
    saved = order.state()
    assert saved == {"taken": 6}
    order = LookAhead(Shuffled(PROMPTS, seed=2))
    order.load_state(saved)
    rest, _ = run(ahead=1, steps=3, last=6, order=order, first=4)
    assert [prompts for prompts, _ in first + rest] == [prompts for prompts, _ in whole]
    assert [versions for _, versions in rest] == [{3}, {3}, {4}]
