"""What the tests of the in-process engine share: an open engine, and the training forward to compare it with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import make
import torch

from dppo_cli.config.sections import Sampling
from dppo_cli.policy.forward import SharedPrompts
from dppo_cli.policy.head import token_log_probs
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalEngine, LocalRollout
from dppo_cli.types import Batch, Completion, Prompt, Sample

ROUNDING = dict(rtol=1e-5, atol=1e-5)
TEMPERATURE = 0.7


def sampling(
    max_new_tokens: int = 20, temperature: float = TEMPERATURE, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Sampling:
    return Sampling(temperature, top_p, top_k, min_p, max_new_tokens, [])


@contextmanager
def opened(of: Policy, *, merge: bool = True, concurrent_sequences: int = 512) -> Iterator[LocalEngine]:
    """An engine that is synced to version 0."""
    quantised = getattr(of.model, "is_quantized", False)
    weights = "merged" if merge else "quantized" if quantised else "adapter"
    with LocalRollout(weights, None, concurrent_sequences, max_logprobs=1024).load(of, make.fail) as engine:
        engine.sync(0)
        yield engine


def generate(
    of: Policy,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    how: Sampling,
    num_logprobs: int = 0,
    *,
    seed: int = 3,
    merge: bool = True,
    concurrent_sequences: int = 512,
) -> list[list[Completion]]:
    """By an engine that lives for this one call."""
    with opened(of, merge=merge, concurrent_sequences=concurrent_sequences) as engine:
        return in_order(engine.generate(prompts, samples_per_prompt, how, num_logprobs, seed))


def trained(of: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> torch.Tensor:
    """Log-prob of each token as the learner computes it."""
    token_ids = [prompt.token_ids for prompt in prompts]
    samples = [Sample(i, c, 1.0, c.mu) for i, row in enumerate(completions) for c in row]
    batch = Batch.pack(samples, token_ids, of.pad_id, of.device)
    hidden_NH = SharedPrompts(of, dict(enumerate(token_ids)), budget=64).predicting_states(batch)
    return token_log_probs(of.head.at(TEMPERATURE), hidden_NH, batch.token_N, chunk_size=64)[0].detach()
