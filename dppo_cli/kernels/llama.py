"""Decoding of one token per sequence for models built like Llama, without transformers' code around the layers.

The modules and sums are those of transformers' classes, with fewer operations. Work that takes as long for one token as
for a thousand is left out (building masks, choosing an attention, passing arguments through the layers), and norms are
shorter. With few sequences on a CPU, reading the weights evicts all other code from the caches, so a small operation
takes several times as long as by itself. In total this saves an eighth of a step of SmolLM2-135M with 8 sequences, and
a fifth with 2. On GPUs in 16 bits, what is between the products runs in the kernels of `fused`, if `fuse` found them to
work: four for a layer instead of thirty.

Shapes: A sequences, X positions written so far, H hidden size, K key heads, Q query heads per key head, D head size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
AddAndNorm = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""x [..., H] and what is added to it, if anything: the sum and its norm."""
Turn = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
"""Queries and keys [A, heads, D] and `Operations.angles`: what they are at their positions."""
Gated = Callable[[Tensor, Tensor], Tensor]
"""gate and up [..., I]: act(gate) up."""


def each(*modules: nn.Module) -> Projections:
    """Their own forward passes."""
    return lambda x: [module(x) for module in modules]


class Operations(Protocol):
    """What a step computes between the products; made of a model's modules once, called for each token."""

    def add_and_norm(self, norm: nn.Module) -> AddAndNorm: ...

    def turn(self, attention: nn.Module) -> Turn: ...

    def gated(self, mlp: nn.Module) -> Gated: ...

    def angles(self, cos_A1D: Tensor, sin_A1D: Tensor) -> tuple[Tensor, Tensor]:
        """What `turn` wants to know of the positions, the same in all layers."""
        ...


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
        self.operations = of = operations(base.norm)
        self.layers = []
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            products = (
                project(attention.q_proj, attention.k_proj, attention.v_proj),
                project(attention.o_proj),
                project(mlp.gate_proj, mlp.up_proj),
                project(mlp.down_proj),
            )
            norms = of.add_and_norm(layer.input_layernorm), of.add_and_norm(layer.post_attention_layernorm)
            self.layers.append((attention.scaling, products, norms, of.turn(attention), of.gated(mlp)))
        self.attend = attend
        self.last_norm = of.add_and_norm(base.norm)

    def __call__(self, cache: Sequence[Any], token_A: Tensor, position_A1: Tensor, mask_AX: Tensor | None) -> Tensor:
        """Final hidden states [A, 1, H] of one token per sequence: ids int64 [A] at positions int64 [A, 1].

        `cache`: one per layer, with `update(keys, values)` as in transformers. `mask_AX`: 0 on positions that are not
        attended to.
        """
        x_A1H = self.embed(token_A[:, None])
        cos_A1D, sin_A1D = self.rotary(x_A1H, position_A1)
        angles = self.operations.angles(cos_A1D, sin_A1D)
        unseen_A11X = None
        if mask_AX is not None:
            unseen_AX = torch.zeros_like(mask_AX, dtype=x_A1H.dtype).masked_fill_(mask_AX == 0, -torch.inf)
            unseen_A11X = unseen_AX[:, None, None]
        rows, size = len(token_A), cos_A1D.shape[-1]
        delta_A1H = None  # what the layer before adds
        for (scale, products, norms, turn, gated), states in zip(self.layers, cache, strict=True):
            (qkv, o_proj, gate_and_up, down_proj), (first_norm, second_norm) = products, norms
            x_A1H, normal_A1H = first_norm(x_A1H, delta_A1H)
            q, k, v = qkv(normal_A1H)
            q, k = turn(q.view(rows, -1, size), k.view(rows, -1, size), angles)
            v = v.view(rows, -1, 1, size)
            keys_AKXD, values_AKXD = states.update(k.unsqueeze(2), v)
            # The query heads of a key head take the dimension of positions: one pass over the keys is enough for all.
            q_AKQD = q.view(rows, v.shape[1], -1, size)
            found = self.attend(q_AKQD, keys_AKXD, values_AKXD, attn_mask=unseen_A11X, scale=scale)
            x_A1H, normal_A1H = second_norm(x_A1H, o_proj(found.reshape(rows, 1, -1))[0])
            gate, up = gate_and_up(normal_A1H)
            delta_A1H = down_proj(gated(gate, up))[0]
        return self.last_norm(x_A1H, delta_A1H)[1]


def operations(last_norm: nn.Module) -> Operations:
    """Those that `fuse` gave the modules of a model, where they apply; else plain ones."""
    ask = getattr(last_norm, "operations", None)
    return (ask and ask()) or Plain()


class Plain:
    """See `Operations`."""

    def add_and_norm(self, norm: nn.Module) -> AddAndNorm:
        normal = _norm(norm)

        def run(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
            total = x if delta is None else x + delta
            return total, normal(total)

        return run

    def turn(self, attention: nn.Module) -> Turn:
        # Only Qwen3 has norms of queries and keys.
        q_norm, k_norm = (_norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))

        def run(q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return rotated(q_norm(q), *angles), rotated(k_norm(k), *angles)

        return run

    def gated(self, mlp: nn.Module) -> Gated:
        act: Any = mlp.act_fn
        return lambda gate, up: act(gate) * up

    def angles(self, cos_A1D: Tensor, sin_A1D: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = sin_A1D.chunk(2, dim=-1)
        return cos_A1D, torch.cat([-lower, upper], dim=-1)


def rotated(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), (a, b) -> (a cos - b sin, b cos + a sin).

    Rolling by half swaps a and b, and `signed_sin` already contains the minus.
    """
    return heads * cos + heads.roll(cos.shape[-1] // 2, dims=-1) * signed_sin


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
