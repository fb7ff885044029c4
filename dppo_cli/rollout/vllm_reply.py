"""What a vLLM server answers, as token ids and a report. Shapes: T tokens of a response, K reported log-probs."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dppo_cli.errors import RolloutError
from dppo_cli.types import PolicyReport

PREFIX = "token_id:"
"""What the server puts before the number of a token where it is asked for numbers instead of texts."""
MINUS_INFINITY = -9999.0
"""What it writes for a log-prob of minus infinity, which JSON does not have."""


def read_choices(reply: bytes, num_logprobs: int) -> Iterator[tuple[Tensor, PolicyReport, bool]]:
    """Tokens, int64 [T], and report of each response to one prompt, and whether it ended before its limit.

    Left out are responses that the server gave up before they had ended. Raises RolloutError for an answer that does
    not hold what was asked for.
    """
    try:
        choices = json.loads(reply)["choices"]
        for choice in choices:
            if choice["finish_reason"] in ("stop", "length"):
                yield *_read(choice, num_logprobs), choice["finish_reason"] == "stop"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RolloutError(
            f"the server's answer is not what vLLM 0.10.2 or later gives ({type(error).__name__}: {error}); its first "
            f"part: {reply[:200]!r}"
        ) from None


def _read(choice: dict[str, Any], num_logprobs: int) -> tuple[Tensor, PolicyReport]:
    tokens, found = choice["token_ids"], choice["logprobs"]
    logp_T = torch.tensor(found["token_logprobs"], dtype=torch.float32)
    token_T = torch.tensor(tokens, dtype=torch.int64)
    if logp_T.shape != token_T.shape or not tokens:
        raise ValueError(f"{len(tokens)} tokens with {len(logp_T)} log-probs")
    if (logp_T > 0).any():
        raise RolloutError(
            "the server reports log-probs above 0, which are none; start it with --logprobs-mode processed_logprobs"
        )
    if num_logprobs == 0:
        return token_T, PolicyReport(logp_T)
    rows = [_largest(step, token, num_logprobs) for step, token in zip(found["top_logprobs"], tokens, strict=True)]
    ids_TK = torch.tensor([[int(key.removeprefix(PREFIX)) for key in row] for row in rows])
    values_TK = torch.tensor([list(row.values()) for row in rows], dtype=torch.float32)
    if ids_TK.shape != (len(tokens), num_logprobs):
        raise ValueError(f"lists of {ids_TK.shape[-1]} log-probs instead of {num_logprobs}")
    values_TK[values_TK <= MINUS_INFINITY] = -torch.inf
    return token_T, PolicyReport(logp_T, ids_TK, values_TK)


def _largest(step: dict[str, float], token: int, count: int) -> dict[str, float]:
    """The `count` largest of a token's list, largest first. The list has the sampled token besides, if it is none."""
    if len(step) > count:
        step = {key: value for key, value in step.items() if key != f"{PREFIX}{token}"}
    return dict(sorted(step.items(), key=lambda entry: -entry[1]))
