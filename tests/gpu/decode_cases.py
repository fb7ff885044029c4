"""What is checked of static decoding steps on a GPU, as functions of the device, so that a CPU runs them, too."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import make
import tiny_models
import torch

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.sections import Sampling
from dppo_cli.kernels.graphs import Graphs
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.blocks import Pace
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalEngine, LocalRollout
from dppo_cli.rollout.refill import ON_CUDA, Refilling
from dppo_cli.types import Completion

SMALL = replace(ON_CUDA, rows=(2, 4, 8), width=16)
"""Several numbers of rows and widths in a short test."""
SLOTS = 6
TEXTS = (*make.MIXED, "2+2=", "b", "say it", "9-", "3 x", "yes")
"""More prompts than there are places, so that places change hands, too."""


def policy(config: TrainConfig, device: str, dtype: str) -> Policy:
    """Several tokens end a response, so that lengths differ."""
    hardware = replace(config.hardware, device=device, dtype=dtype)
    # A CPU may have no bfloat16, which is a warning.
    of = load_policy(config.model, hardware, warn=lambda _: None, adapter=config.adapter)
    make.move_adapter(of, 0.05)
    gemma3 = of.model.config.model_type == "gemma3_text"
    return replace(of, eos_ids=(1, *(tiny_models.SAMPLED_FROM_GEMMA3 if gemma3 else (5, 6))))


def generated(engine: LocalEngine, num_logprobs: int, temperature: float = 0.7) -> list[list[Completion]]:
    how = Sampling(temperature, 1.0, 0, 0.0, 40, [])
    return in_order(engine.generate(make.prompts(engine.policy, TEXTS), 4, how, num_logprobs, seed=3))


def opened(of: Policy, weights: str = "auto", pace: Pace = SMALL, warn: Callable[[str], None] = make.fail) -> Any:
    engine = LocalRollout(weights, None, SLOTS, 64).load(of, lambda _: None)
    engine.refilling = Refilling(of, SLOTS, warn, pace)
    return engine


def graphs_and_calls(of: Policy, num_logprobs: int, weights: str = "auto") -> Graphs:
    """Replayed steps give the tokens and log-probs of called ones, bit for bit: the kernels are the same.

    So do those of a second call, whose graphs were there from its beginning, if they stay.
    """
    with opened(of, weights) as engine:
        engine.sync(0)
        graphs = engine.refilling.graphs
        replayed = [generated(engine, num_logprobs) for _ in range(2)]
        recorded = graphs.records
    with opened(of, weights) as engine:
        engine.sync(0)
        engine.refilling.graphs.records = False
        called = generated(engine, num_logprobs)
    assert recorded == (of.device.type == "cuda") and not graphs.recorded
    lengths = {len(c.token_ids_T) for c in make.flat(called)}
    assert len(lengths) > 3
    for each in replayed:
        _equal(each, called)
    return graphs


def _equal(found: Sequence[Sequence[Completion]], expected: Sequence[Sequence[Completion]]) -> None:
    assert make.tokens(found) == make.tokens(expected)
    ours, plain = make.reported(found), make.reported(expected)
    assert torch.equal(ours.logp_N, plain.logp_N)
    if plain.topk_logp_NK is not None:
        assert torch.equal(ours.topk_ids_NK, plain.topk_ids_NK)
        assert torch.equal(ours.topk_logp_NK, plain.topk_logp_NK)


def slots_and_sub_batches(of: Policy) -> float:
    """The largest difference of log-probs from those of sampling sub-batch by sub-batch, as long as tokens are equal.

    A rounding may turn a token, and all after it.
    """
    with opened(of) as engine:
        engine.sync(0)
        ours = make.flat(generated(engine, 0))
        engine.refilling = None
        plain = make.flat(generated(engine, 0))
    pairs = [(a, b, _equal_tokens(a, b)) for a, b in zip(ours, plain, strict=True)]
    equal, tokens = sum(n for _, _, n in pairs), sum(len(a.token_ids_T) for a in ours)
    assert equal >= tokens * (0.9 if of.dtype == torch.float32 else 0.2), f"{equal} of {tokens} tokens"
    return float(torch.stack([(a.mu.logp_N[:n] - b.mu.logp_N[:n]).abs().max() for a, b, n in pairs if n]).max())


def _equal_tokens(a: Completion, b: Completion) -> int:
    """How many the two have in common before the first that differs."""
    pairs = zip(a.token_ids_T.tolist(), b.token_ids_T.tolist(), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def the_adapter_is_read_anew(of: Policy) -> None:
    """By the graphs of the call before, which stay where the policy itself is sampled from."""
    with opened(of, "quantized" if getattr(of.model, "is_quantized", False) else "adapter") as engine:
        engine.sync(0)
        before = generated(engine, 0)
        kept = engine.refilling.sequences
        make.move_adapter(of, 0.5, seed=1)
        engine.sync(1)
        after = generated(engine, 0)
        assert (kept is not None) == (of.device.type == "cuda") and kept is engine.refilling.sequences
        assert make.tokens(after) != make.tokens(before)
    with opened(of, "quantized" if getattr(of.model, "is_quantized", False) else "adapter") as engine:
        engine.sync(1)
        _equal(generated(engine, 0), after)


def evaluations_between_steps(of: Policy) -> None:
    """Slots and graphs of training and of an evaluation, which is greedy, stay, and give the same each time."""
    with opened(of, "quantized" if getattr(of.model, "is_quantized", False) else "adapter") as engine:
        engine.sync(0)
        first = [generated(engine, 4), generated(engine, 0, temperature=0.0)]
        kept, recorded = engine.refilling.sequences, len(engine.refilling.graphs.recorded)
        again = [generated(engine, 4), generated(engine, 0, temperature=0.0)]
        assert kept is engine.refilling.sequences and recorded == len(engine.refilling.graphs.recorded)
        assert (kept is not None, recorded > 0) == 2 * (of.device.type == "cuda",)
    for found, expected in zip(again, first, strict=True):
        _equal(found, expected)
