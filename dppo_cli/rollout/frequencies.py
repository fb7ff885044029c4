"""Whether a key keeps its rotation when its sequence grows, as a cache of keys supposes."""

from typing import Any

from transformers import PreTrainedModel

from dppo_cli.errors import ModelError

FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary frequencies that do not depend on how long the longest sequence is."""
TWO_SETS = "longrope"
"""arXiv 2402.13753; Phi-3, Phi-4-mini. The second set is for all tokens as soon as the longest sequence has more than
the first is for."""


def are_fixed(model: PreTrainedModel) -> bool:
    """For sequences that `check_length` lets pass."""
    kinds: Any = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", None)
    # Some models have other ones for each kind of layer.
    return all(kind in (*FIXED, TWO_SETS) for kind in (kinds.values() if isinstance(kinds, dict) else (kinds,)))


def check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ModelError if keys in the cache would have other rotary frequencies than when all tokens run at once."""
    found: dict[str, Any] = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for of in (found, *found.values()):
        if isinstance(of, dict) and of.get("rope_type") == TWO_SETS:
            limit = of["original_max_position_embeddings"]
            if prompt_tokens + max_new_tokens > limit:
                raise ModelError(
                    f"this model's rotary frequencies change for all tokens beyond {limit} (longrope), and prompts of "
                    f"up to {prompt_tokens} tokens with sampling.max_new_tokens={max_new_tokens} can have more; lower "
                    "it, or shorten the prompts"
                )
