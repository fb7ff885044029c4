"""Sampling in several processes gives what one gives, whoever samples which prompt."""

from collections.abc import Iterator, Sequence
from typing import Any

import make
import pytest
import torch
from crews import crew
from engines import ROUNDING, opened, sampling

from dppo_cli.commands.replica import numbered
from dppo_cli.errors import NumericalError
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalEngine
from dppo_cli.rollout.shared import SharedEngine, slices
from dppo_cli.types import Completion


@pytest.fixture(scope="module")
def policies(train_config) -> list[Any]:
    """Equal ones: processes share nothing."""
    return [make.policy(train_config(), adapter_scale=0.3) for _ in range(3)]


def table(engine: LocalEngine) -> dict[str, Any]:
    return {"sync": engine.sync, "generate": lambda *asked: numbered(engine, *asked)}


class Theirs:
    def generate(self, prompts: Sequence[str], *how: Any) -> Iterator[tuple[int, str]]:
        return enumerate(f"{prompt} of {list(how[-1])}" for prompt in prompts)


def rows(found: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids_T.tolist() for c in group] for group in found]


@pytest.mark.parametrize(("processes", "count"), [(2, 4), (3, 4), (3, 2), (3, 1), (2, 5)])
def test_tokens_and_reports_are_those_of_one_process(policies, processes: int, count: int) -> None:
    prompts = (make.prompts(policies[0]) * 2)[:count]
    asked = (3, sampling(), 5, 17)
    with opened(policies[0]) as alone:
        expected = in_order(alone.generate(prompts, *asked))
    engines = [opened(policy) for policy in policies[1:processes]]
    tables = [table(engine.__enter__()) for engine in engines]
    with opened(policies[0]) as own, crew(*tables) as workers, SharedEngine(own, workers) as engine:
        engine.sync(7)
        found = in_order(engine.generate(prompts, *asked))
    assert rows(found) == rows(expected)
    assert {c.versions for group in found for c in group} == {(7,)}, "all were synced"
    assert [c.text for group in found for c in group] == [c.text for group in expected for c in group]
    for a, b in zip(make.flat(found), make.flat(expected), strict=True):
        torch.testing.assert_close(a.mu.logp_N, b.mu.logp_N, **ROUNDING)
        assert a.mu.topk_ids_NK is not None and a.mu.topk_ids_NK.shape == (len(a.token_ids_T), 5)


def test_a_part_of_a_call_gives_what_the_call_gives(policies) -> None:
    prompts = make.prompts(policies[0])
    asked = (2, sampling(), 0, 17)
    with opened(policies[0]) as engine:
        whole = in_order(engine.generate(prompts, *asked))
        part = in_order(engine.generate(prompts[2:], *asked, numbers=[2, 3]))
        other = in_order(engine.generate(prompts[2:], *asked))
    assert rows(part) == rows(whole)[2:] != rows(other)


def test_a_prompt_is_there_as_soon_as_it_has_ended() -> None:
    """Rewards begin with it, whichever process sampled it."""

    class Own:
        def generate(self, prompts: Sequence[str], *how: Any) -> Iterator[tuple[int, str]]:
            assert workers.lines[0].connection.poll(30), "the worker has something"
            yield from enumerate(f"{prompt}'s" for prompt in prompts)

    with crew({"generate": lambda *asked: numbered(Theirs(), *asked)}) as workers:
        shared: Any = SharedEngine(Own(), workers)  # type: ignore[arg-type]
        found = list(shared.generate(["a", "b", "c"], 1, None, 0, 0))
    assert found == [(0, "a's"), (2, "c of [2]"), (1, "b's")]


def test_a_policy_that_is_broken_in_one_process(policies) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        raise NumericalError("the log-probs are not finite")

    prompts = make.prompts(policies[0])
    with (
        opened(policies[0]) as own,
        crew({"generate": broken}) as workers,
        pytest.raises(NumericalError, match="the log-probs are not finite"),
    ):
        list(SharedEngine(own, workers).generate(prompts, 1, sampling(), 0, 1))


def test_it_says_in_how_many_processes_it_samples(policies) -> None:
    with opened(policies[0]) as own, crew({}, {}) as workers:
        assert SharedEngine(own, workers).samples_with == f"{own.samples_with}; in 3 processes"


def test_slices_cover_everything_once() -> None:
    for count in range(9):
        for parts in range(1, 5):
            found = [list(range(count))[of] for of in slices(count, parts)]
            assert make.flat(found) == list(range(count)) and len(found) == parts
            sizes = [len(part) for part in found]
            assert max(sizes) - min(sizes) <= 1
