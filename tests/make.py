"""Prompts, completions and policies for tests, made by hand or by a tiny model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dppo_cli.config import TrainConfig
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Completion, PolicyReport, Prompt, Sample

MIXED = ("1+2=", "hello world foo bar", "a", "12+34= abcdefgh ijk lmn")
"""Prompts of different lengths, so that a batch is padded; the longest ones outgrow the windows of tests/tiny.py."""

BEGINNING = "Please answer with a number: "
ALIKE = tuple(BEGINNING + rest for rest in ("1+2=", "12+34+56=", "7", "8"))
"""Prompts with a common beginning that is worth running once."""


LOADED: dict[str, tuple[Policy, list[Tensor]]] = {}


def policy(config: TrainConfig, *, adapter_scale: float = 0.0, seed: int = 0) -> Policy:
    """The config's model with a fresh adapter; `adapter_scale` > 0 gives the adapter an effect.

    Loaded once: equal configs give the same object, with the adapter set back to what it was when it was loaded.
    """
    hardware = config.hardware
    key = repr((config.model, config.adapter, config.seed, hardware.dtype, hardware.gradient_checkpointing))
    if key not in LOADED:
        made = load_policy(
            config.model.path, config.model.revision, hardware, new_adapter=config.adapter, seed=config.seed
        )
        LOADED[key] = made, [p.detach().clone() for p in made.parameters]
    made, start = LOADED[key]
    for parameter, value in zip(made.parameters, start, strict=True):
        parameter.data.copy_(value)
        parameter.grad = None
    if adapter_scale:
        move_adapter(made, adapter_scale, seed)
    return made


def plain_policy(folder: Path, config: TrainConfig) -> Policy:
    """A model without an adapter."""
    return load_policy(str(folder), None, config.hardware)


def move_adapter(of: Policy, scale: float, seed: int = 0) -> None:
    """Set the half of the adapter that starts at zero to normal random numbers of standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in of.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def prompts(of: Policy, texts: Sequence[str] = MIXED) -> list[Prompt]:
    return [Prompt(i, text, tuple(of.tokenizer(text)["input_ids"]), "", {}) for i, text in enumerate(texts)]


def completion(
    token_ids: Sequence[int] = (5,),
    *,
    text: str = "",
    answer: str = "",
    index: int = 0,
    prompt_ids: Sequence[int] = (3,),
    logp: Sequence[float] | None = None,
    sampled: Sequence[bool] | None = None,
    **columns: Any,
) -> Completion:
    """One made by hand; log mu defaults to -1 for each sampled token."""
    sampled_T = torch.tensor([True] * len(token_ids) if sampled is None else list(sampled))
    logp_N = torch.tensor([-1.0] * int(sampled_T.sum()) if logp is None else list(logp))
    prompt = Prompt(index, f"prompt {index}", tuple(prompt_ids), answer, columns)
    return Completion(prompt, torch.tensor(list(token_ids)), sampled_T, PolicyReport(logp_N), text, True, 0)


def samples(completions: Sequence[Completion], advantages: Sequence[float]) -> list[Sample]:
    return [Sample(c, 0.0, a, c.mu) for c, a in zip(completions, advantages, strict=True)]


@torch.no_grad()
def trained_log_probs(of: Policy, completions: Sequence[Completion], temperature: float) -> Tensor:
    """log pi at every sampled token, [N, V], in the order of `completions`: a forward pass for each, no padding."""
    rows = []
    for completion in completions:
        ids = torch.tensor([[*completion.prompt.token_ids, *completion.token_ids_T.tolist()]])
        # One to the left of each token stands the state that predicts it.
        rows.append(of.hidden_states(ids)[0, len(completion.prompt.token_ids) - 1 : -1][completion.sampled_T])
    hidden_NH = torch.cat(rows)
    return of.head.at(temperature).log_probs(hidden_NH)


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [c.token_ids_T.tolist() for c in completions]
