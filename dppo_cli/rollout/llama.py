"""One token of each sequence through models built like Llama, without what transformers does around their layers.

The same modules and operations as in transformers' classes. Left out is what costs as much for one token as for a
thousand: building masks, choosing an attention, carrying arguments through the layers. That is 7 to 10% of a step of
SmolLM2-135M with 2 to 8 sequences on a CPU.

Shapes: A sequences, X places written so far, H hidden size, K key heads, Q query heads of each, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


def is_built_like_llama(model: PreTrainedModel) -> bool:
    """Whether `llama_step` computes what the model does, if every layer's cache keeps all places (no window)."""
    layers = getattr(model.base_model, "layers", ())
    return model.config._attn_implementation == "sdpa" and bool(layers) and all(type(m) in LAYERS for m in layers)


def llama_step(
    model: PreTrainedModel, cache: Sequence[Any], token_A: Tensor, position_A1: Tensor, mask_AX: Tensor | None
) -> Tensor:
    """Final hidden state [A, 1, H] of one token of each sequence, int64 [A] at int64 [A, 1].

    `cache`: each layer's, with `update(keys, values)` as in transformers. `mask_AX`: 0 on places not to be seen.
    """
    base: Any = model.base_model
    x_A1H = base.embed_tokens(token_A[:, None])
    cos_A1D, sin_A1D = base.rotary_emb(x_A1H, position_A1)
    lower, upper = sin_A1D.chunk(2, dim=-1)
    sin_A1D = torch.cat([-lower, upper], dim=-1)
    unseen_A11X = None
    if mask_AX is not None:
        unseen_A11X = torch.zeros_like(mask_AX, dtype=x_A1H.dtype).masked_fill_(mask_AX == 0, -torch.inf)[:, None, None]

    def rotated(heads: Any) -> Any:
        return heads * cos_A1D + heads.roll(heads.shape[-1] // 2, dims=-1) * sin_A1D

    for layer, states in zip(base.layers, cache, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        seen = layer.input_layernorm(x_A1H)
        q, k, v = (
            project(seen).view(len(seen), -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if type(layer) is Qwen3DecoderLayer:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = rotated(q), rotated(k)
        keys_AKXD, values_AKXD = states.update(k[:, :, None], v[:, :, None])
        # The query heads of one key head as its places: one pass over the keys for all of them.
        q_AKQD = q.view(len(k), k.shape[1], -1, attention.head_dim)
        found = scaled_dot_product_attention(
            q_AKQD, keys_AKXD, values_AKXD, attn_mask=unseen_A11X, scale=attention.scaling
        )
        x_A1H = x_A1H + attention.o_proj(found.reshape(len(k), 1, -1))
        seen = layer.post_attention_layernorm(x_A1H)
        x_A1H = x_A1H + mlp.down_proj(mlp.act_fn(mlp.gate_proj(seen)) * mlp.up_proj(seen))
    return base.norm(x_A1H)  # type: ignore[no-any-return]
