"""What goes wrong in an update, in words: values that are not finite, memory that does not suffice."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dppo_cli.errors import NumericalError, RunError
from dppo_cli.types import Batch, Group, Sample


def check_finite(loss_N: Tensor) -> None:
    """Raise NumericalError if a token's loss is NaN or infinite."""
    broken = (~torch.isfinite(loss_N)).nonzero().squeeze(-1).tolist()
    if broken:
        values = f"{loss_N[broken[0]].item()}"
        raise NumericalError(f"the loss of {len(broken)} of {loss_N.numel()} tokens is not finite ({values})", broken)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of torch's allocator on a CPU, or of Python; or for more bytes than can be counted."""
    words = ("can't allocate memory", "MPS backend out of memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def out_of_memory(error: BaseException) -> RunError | None:
    """The error in words, with its notes, if it is of that kind."""
    if not is_out_of_memory(error):
        return None
    asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    notes = [note.removeprefix("dppo: ") for note in getattr(error, "__notes__", [])]
    words = [
        f"out of memory{f' ({asked[0].lower()})' if asked else ''}; lower rollout.concurrent_sequences, "
        "hardware.tokens_per_micro_batch, hardware.head_chunk or adapter.r",
        *notes,
    ]
    return RunError("; ".join(words))


def named(error: NumericalError, batch: Batch, samples: Sequence[Sample], groups: Sequence[Group]) -> NumericalError:
    """The error with the first of its tokens: which problem, which position."""
    if not error.tokens:
        return error
    n = error.tokens[0]
    prompt = groups[samples[int(batch.row_N[n])].prompt].prompt
    where = (
        f"token {int(batch.token_N[n])} at position {int(batch.position_N[n])} of a response to problem {prompt.index}"
    )
    return NumericalError(f"{error}: {where} ({prompt.example.prompt[:60]!r})", error.tokens)


def describe(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as JSON, to find out what was wrong with them."""
    return [
        {
            "problem": group.prompt.index,
            "prompt": group.prompt.example.prompt,
            "prompt_token_ids": group.prompt.token_ids,
            "completions": [
                {
                    "text": completion.text,
                    "token_ids": completion.token_ids_T.tolist(),
                    # As text: NaN and infinity are no JSON.
                    "logp_mu": [str(value) for value in completion.mu.logp_N.tolist()],
                    "reward": score.value,
                    "advantage": advantage,
                }
                for completion, score, advantage in zip(group.completions, group.scores, group.advantages, strict=True)
            ],
        }
        for group in groups
    ]
