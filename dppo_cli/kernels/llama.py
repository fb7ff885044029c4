"""Decoding of one token per sequence for models built like Llama, without transformers' code around the layers.

The modules and sums are those of transformers' classes, with fewer operations. Work that takes as long for one token as
for a thousand is left out (building masks, choosing an attention, passing arguments through the layers), and norms are
shorter. With few sequences on a CPU, reading the weights evicts all other code from the caches, so a small operation
takes several times as long as by itself. In total this saves an eighth of a step of SmolLM2-135M with 8 sequences, and
a fifth with 2.

Shapes: A sequences, X positions written so far, H hidden size, K key heads, Q query heads per key head, D head size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


def is_built_like_llama(model: PreTrainedModel) -> bool:
    """Whether `LlamaStep` computes the same as the model, if every layer's cache keeps all positions (no window)."""
    layers = getattr(model.base_model, "layers", ())
    return model.config._attn_implementation == "sdpa" and bool(layers) and all(type(m) in LAYERS for m in layers)


Projections = Callable[[Tensor], Sequence[Tensor]]
"""The outputs of linear layers that read one input."""
Attend = Callable[..., Tensor]
"""Called as `scaled_dot_product_attention(q, keys, values, attn_mask=..., scale=...)`, and computes the same."""


def each(*modules: nn.Module) -> Projections:
    """Their own forward passes."""
    return lambda x: [module(x) for module in modules]


class LlamaStep:
    """Made once per sub-batch, called once per token. Reads the norms' weights when made, all others in each call.

    `project` makes the products of linear layers that read one input.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        project: Callable[..., Projections] = each,
        attend: Attend = scaled_dot_product_attention,
    ) -> None:
        base: Any = model.base_model
        self.embed, self.rotary = base.embed_tokens, base.rotary_emb
        # Only Qwen3 has norms of queries and keys.
        names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        self.layers = []
        for layer in base.layers:
            modules = dict(layer.named_modules())
            attention, mlp = layer.self_attn, layer.mlp
            products = (
                project(attention.q_proj, attention.k_proj, attention.v_proj),
                project(attention.o_proj),
                project(mlp.gate_proj, mlp.up_proj),
                project(mlp.down_proj),
            )
            self.layers.append((layer, products, [_norm(modules.get(name)) for name in names]))
        self.attend = attend
        self.last_norm = _norm(base.norm)

    def __call__(self, cache: Sequence[Any], token_A: Tensor, position_A1: Tensor, mask_AX: Tensor | None) -> Tensor:
        """Final hidden states [A, 1, H] of one token per sequence: ids int64 [A] at positions int64 [A, 1].

        `cache`: one per layer, with `update(keys, values)` as in transformers. `mask_AX`: 0 on positions that are not
        attended to.
        """
        x_A1H = self.embed(token_A[:, None])
        cos_A1D, sin_A1D = self.rotary(x_A1H, position_A1)
        lower, upper = sin_A1D.chunk(2, dim=-1)
        sin_A1D = torch.cat([-lower, upper], dim=-1)
        unseen_A11X = None
        if mask_AX is not None:
            unseen_AX = torch.zeros_like(mask_AX, dtype=x_A1H.dtype).masked_fill_(mask_AX == 0, -torch.inf)
            unseen_A11X = unseen_AX[:, None, None]
        rows, size = len(token_A), cos_A1D.shape[-1]

        # Rotary embedding (arXiv 2104.09864), (a, b) -> (a cos - b sin, b cos + a sin). Rolling by half swaps a and b,
        # and sin already contains the minus.
        def rotated(heads: Any) -> Any:
            return heads * cos_A1D + heads.roll(size // 2, dims=-1) * sin_A1D

        for (layer, products, norms), states in zip(self.layers, cache, strict=True):
            (qkv, o_proj, gate_and_up, down_proj), (first_norm, second_norm, q_norm, k_norm) = products, norms
            q, k, v = qkv(first_norm(x_A1H))
            q = q_norm(q.view(rows, -1, size))
            k = k_norm(k.view(rows, -1, size))
            v = v.view(rows, -1, 1, size)
            keys_AKXD, values_AKXD = states.update(rotated(k).unsqueeze(2), v)
            # The query heads of a key head take the dimension of positions: one pass over the keys is enough for all.
            q_AKQD = rotated(q).view(rows, v.shape[1], -1, size)
            scale = layer.self_attn.scaling
            found = self.attend(q_AKQD, keys_AKXD, values_AKXD, attn_mask=unseen_A11X, scale=scale)
            x_A1H = x_A1H + o_proj(found.reshape(rows, 1, -1))[0]
            gate, up = gate_and_up(second_norm(x_A1H))
            x_A1H = x_A1H + down_proj(layer.mlp.act_fn(gate) * up)[0]
        return self.last_norm(x_A1H)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """RMSNorm (arXiv 1910.07467), y = w x / sqrt(mean(x^2) + eps) over n = H or D numbers.

    In float32 it is computed as y = sqrt(n) w x / hypot(|x|, sqrt(eps n)): four operations instead of six, equal to
    rounding. In other precisions transformers rounds in between, so the module itself is returned. Without a module it
    is the identity.
    """
    if module is None:
        return lambda x: x
    if module.weight.dtype != torch.float32:
        return module  # type: ignore[no-any-return]
    size = module.weight.numel()
    weight_H = module.weight.detach() * math.sqrt(size)
    least = torch.tensor(math.sqrt(module.variance_epsilon * size), device=weight_H.device)
    return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least) * weight_H
