"""What the tests of sampling with slots share: an engine that does, and a comparison with one that does not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import make
import torch
from engines import ROUNDING, opened
from recording import RecordedGraphs

from dppo_cli.config.sections import Sampling
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.blocks import Pace
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalEngine
from dppo_cli.rollout.refill import Refilling
from dppo_cli.rollout.static import StaticSequences
from dppo_cli.types import Completion, Prompt

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2"),
    *("gemma3", "mistral_window"),
)
LOOKING = Pace(steps=1, ahead=0)
AHEAD = Pace(steps=4, ahead=1, rows=(2, 4), width=8)
"""Blocks, rows and widths so small that a test goes through several of each."""


def several_ends(of: Policy, ends: Sequence[int] = range(5, 9)) -> Policy:
    return replace(of, eos_ids=(1, *ends))


@contextmanager
def refilled(
    of: Policy, slots: int = 5, pace: Pace = AHEAD, merge: bool = True, graphs: RecordedGraphs | None = None
) -> Iterator[LocalEngine]:
    with opened(of, merge=merge) as engine:
        engine.refilling = Refilling(of, slots, make.fail, pace)
        if graphs is not None:
            engine.refilling.graphs = graphs
        yield engine


def sampled(
    of: Policy, prompts: Sequence[Prompt], group: int, how: Sampling, num_logprobs: int = 0, seed: int = 3, **more
) -> list[list[Completion]]:
    with refilled(of, **more) as engine:
        return in_order(engine.generate(prompts, group, how, num_logprobs, seed))


def check_equal(found: Sequence[Sequence[Completion]], expected: Sequence[Sequence[Completion]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert make.tokens(found) == make.tokens(expected)
    for ours, plain in zip(make.flat(found), make.flat(expected), strict=True):
        assert (ours.status, ours.text, ours.versions) == (plain.status, plain.text, plain.versions)
        torch.testing.assert_close(ours.mu.logp_N, plain.mu.logp_N, **ROUNDING)
        assert not ours.mu.logp_N.is_inference(), "training reads it"
        assert (ours.mu.topk_ids_NK is None) == (plain.mu.topk_ids_NK is None)
        if ours.mu.topk_ids_NK is not None:
            assert torch.equal(ours.mu.topk_ids_NK, plain.mu.topk_ids_NK)
            torch.testing.assert_close(ours.mu.topk_logp_NK, plain.mu.topk_logp_NK, **ROUNDING)
        assert (ours.mu.hidden_NH is None) == (plain.mu.hidden_NH is None)
        if ours.mu.hidden_NH is not None:
            torch.testing.assert_close(ours.mu.full_log_probs(), plain.mu.full_log_probs(), **ROUNDING)


def tensors(sequences: StaticSequences) -> list[torch.Tensor]:
    pools = [pool for state in sequences.decoding.states for pool in (state.keys, state.values)]
    own = [sequences.place_S, sequences.step_S, sequences.writing_S, sequences.hidden_SH, sequences.uniform_ST]
    own += [sequences.prompt_length_P, sequences.prompt_hidden_PH, sequences.mass_SV]
    return [*pools, *own, *sequences.columns, *sequences.decoding.beside.copies]
