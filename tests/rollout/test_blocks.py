"""The host's side of sampling with slots: when it looks, what it fills them with, and which steps it asks for."""

from dataclasses import replace

import make
import pytest
import torch
from engines import generate, sampling
from recording import RecordedGraphs
from refills import LOOKING, check_equal, refilled, sampled

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.rollout import static
from dppo_cli.rollout.blocks import Pace

merging = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


def test_a_prompt_comes_when_its_samples_have_ended(policy):
    """One with long responses does not hold the others up, whose places the next ones have taken long ago."""
    prompts = make.prompts(policy, ("1+2=", "hello", "a", "7", "b", "see"))
    with refilled(policy, slots=4, pace=LOOKING) as engine:
        numbers, rows = zip(*engine.generate(prompts, 2, sampling(20), 0, seed=3), strict=True)
    assert sorted(numbers) == list(range(6)) and list(numbers) != sorted(numbers)
    longest = [max(len(c.token_ids_T) for c in row) for row in rows]
    assert numbers[longest.index(max(longest))] < max(numbers[: longest.index(max(longest))])


def test_ended_sequences_make_room_at_the_next_look(policy):
    """Slots are busy but for the last sequences' end: so many steps as there are tokens for each slot, and a few."""
    prompts, graphs = make.prompts(policy) * 6, RecordedGraphs()
    found = sampled(policy, prompts, 4, sampling(20), slots=8, pace=LOOKING, graphs=graphs)
    lengths = [len(c.token_ids_T) for c in make.flat(found)]
    steps = sum(graphs.calls.values())
    assert sum(lengths) / 8 <= steps <= sum(lengths) / 8 + 20
    in_waves = sum(max(lengths[start : start + 8]) for start in range(0, len(lengths), 8))
    assert steps < 0.8 * in_waves


def test_each_prompt_runs_once(policy, monkeypatch):
    ran: list[tuple[int, ...]] = []
    real = static.run_prompts

    def counted(model, prompts, cache):
        ran.extend(prompts.token_ids)
        return real(model, prompts, cache)

    monkeypatch.setattr(static, "run_prompts", counted)
    prompts = make.prompts(policy)
    sampled(policy, prompts, 3, sampling(20), slots=2)
    assert sorted(ran) == sorted(prompt.token_ids for prompt in prompts)


def test_prompts_run_in_parts_of_so_many_tokens(policy, monkeypatch):
    """With their padding. One that is longer runs alone; the slots are all filled."""
    ran: list[list[int]] = []
    real = static.run_prompts

    def counted(model, prompts, cache):
        ran.append([len(ids) for ids in prompts.token_ids])
        return real(model, prompts, cache)

    monkeypatch.setattr(static, "run_prompts", counted)
    prompts, graphs = make.prompts(policy, ("1+2=", "hello, hello, hello", "a", "7", "see")), RecordedGraphs()
    lengths = [len(prompt.token_ids) for prompt in prompts]
    pace = replace(LOOKING, prompt_tokens=3 * max(lengths[2:]))
    assert lengths[0] <= pace.prompt_tokens < lengths[1]
    found = sampled(policy, prompts, 2, sampling(20), slots=10, pace=pace, graphs=graphs)
    assert ran == [lengths[:1], lengths[1:2], lengths[2:]]
    assert max(rows for rows, *_ in graphs.calls) == 10
    monkeypatch.undo()
    check_equal(found, generate(policy, prompts, 2, sampling(20)))


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([4], [1]),
        ([40], [1]),
        ([4, 4, 4], [2, 1]),
        ([1, 1, 9], [2, 1]),
        ([9, 1, 1], [1, 2]),
        ([2, 5, 2, 2, 2, 2], [2, 4]),
        ([6, 2, 2], [1, 2]),
    ],
)
def test_parts_are_padded_to_their_longest_prompt(lengths, parts):
    prompts = [make.prompt(ids=range(length)) for length in lengths]
    found = list(Pace(1, 0, prompt_tokens=10).parts(prompts))
    assert [len(part) for part in found] == parts
    assert [prompt for part in found for prompt in part] == prompts


def test_steps_are_for_a_few_numbers_of_rows_and_widths(policy):
    """Rows fall as sequences end, and those that are left move together; widths grow with the longest."""
    graphs, prompts = RecordedGraphs(), make.prompts(policy)
    found = sampled(policy, prompts, 3, sampling(60), slots=100, graphs=graphs)
    check_equal(found, generate(policy, prompts, 3, sampling(60)))
    rows, widths, _ = zip(*graphs.calls, strict=True)
    assert set(rows) == {12, 8, 4, 2} and sorted(rows, reverse=True) == list(rows)
    longest = max(len(c.token_ids_T) for c in make.flat(found))
    # Two blocks of four steps are given to a sequence before it is seen to have ended.
    assert len(set(widths)) >= 4 and all(width % 8 == 0 and width < longest + 8 + 8 for width in widths)


@merging
@pytest.mark.parametrize("num_logprobs", [0, 4, WHOLE_VOCABULARY])
def test_a_step_can_be_replayed(policy, num_logprobs, merge):
    """By what was computed with which tensors, as CUDA graphs do: nothing is read that only the host knows."""
    graphs, prompts = RecordedGraphs(), make.prompts(policy)
    plain = generate(policy, prompts, 4, sampling(20), num_logprobs, merge=merge)
    check_equal(sampled(policy, prompts, 4, sampling(20), num_logprobs, merge=merge, graphs=graphs), plain)
    assert max(graphs.calls.values()) > 4, "steps should be replayed here"


def test_on_cuda_the_host_waits_for_events_alone(policy, monkeypatch):
    """Those of what it reads, and when the next block is on its way: blocks 0 and 1 are launched before 0 is read."""
    log: list[str] = []

    class Event:
        made = 0

        def record(self) -> None:
            self.name, Event.made = str(Event.made), Event.made + 1
            log.append(f"record {self.name}")

        def synchronize(self) -> None:
            log.append(f"wait {self.name}")

    monkeypatch.setattr(static, "CUDA", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    found = sampled(policy, make.prompts(policy), 3, sampling(20), 4, slots=100)
    assert log[:3] == ["record 0", "record 1", "wait 0"]
    assert all(log.index(f"record {n}") < log.index(f"wait {n}") for n in range(Event.made))
    monkeypatch.undo()
    check_equal(found, generate(policy, make.prompts(policy), 3, sampling(20), 4))
