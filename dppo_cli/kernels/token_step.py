"""Decoding of one token per sequence for models of the known families, without transformers' code around the layers.

The modules and sums are those of transformers' classes, with fewer operations. Work that takes as long for one token as
for a thousand is left out (building masks, choosing an attention, passing arguments through the layers), and norms are
shorter. With few sequences on a CPU, reading the weights evicts all other code from the caches, so a small operation
takes several times as long as by itself. In total this saves an eighth of a step of SmolLM2-135M with 8 sequences, and
a fifth with 2. On GPUs in 16 bits, what is between the products runs in the kernels of `fused`, if `fuse` found them to
work: four for a layer of Llama instead of thirty.

Shapes: A sequences, X positions written so far, H hidden size, K key heads, Q query heads per key head, D head size.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from dppo_cli.kernels.layer_parts import Parts, parts_of

Projections = Callable[[Tensor], Sequence[Tensor]]
"""The outputs of linear layers that read one input."""
Attend = Callable[..., Tensor]
"""Called as `scaled_dot_product_attention(q, keys, values, attn_mask=..., scale=...)`, and computes the same."""
AddAndNorm = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""x [..., H] and what is added to it, if anything: the sum and its norm."""
Angles = tuple[Tensor, Tensor]
"""cos and sin, as `Operations.angles` makes them."""
Turn = Callable[[Tensor, Tensor, Angles], tuple[Tensor, Tensor]]
"""Queries and keys [A, heads, D]: what they are at their positions."""
Gated = Callable[[Tensor, Tensor], Tensor]
"""gate and up [..., I]: act(gate) up."""


def each(*modules: nn.Module) -> Projections:
    """Their own forward passes."""
    return lambda x: [module(x) for module in modules]


class Operations(Protocol):
    """What a step computes between the products; made of a model's modules once, called for each token."""

    def add_and_norm(self, norm: nn.Module | None, of_delta: nn.Module | None) -> AddAndNorm:
        """`of_delta`: the norm of what is added. Where there is no `norm`, the sum itself is given for it."""
        ...

    def turn(self, parts: Parts) -> Turn: ...

    def gated(self, parts: Parts) -> Gated: ...

    def angles(self, cos_A1D: Tensor, sin_A1D: Tensor) -> Angles:
        """What `turn` wants to know of the positions, the same in all layers of equal frequencies."""
        ...


@dataclass(frozen=True)
class Layer:
    """What a step calls in a layer, in this order. `angles`, `window`: those of its attention."""

    first_norm: AddAndNorm
    qkv: Projections
    turn: Turn
    attend: Attend
    o_proj: Projections
    second_norm: AddAndNorm
    gate_and_up: Projections
    gated: Gated
    down_proj: Projections
    head_size: int
    scale: float
    angles: str | None
    window: int | None


class TokenStep:
    """Made once per sub-batch, called once per token. Reads the norms' weights when made, all others in each call.

    `windows`: how many positions each layer sees, the token's own among them; None: all. `project` makes the products
    of linear layers that read one input, `attend` the attention of layers with a window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[int | None] | None = None,
        project: Callable[..., Projections] = each,
        attend: Callable[[int | None], Attend] = lambda _: scaled_dot_product_attention,
    ) -> None:
        base: Any = model.base_model
        self.embed, self.rotary = base.embed_tokens, with_fixed_frequencies(base.rotary_emb)
        self.operations = of = operations(base.norm)
        parts = [parts_of(layer, model.config.get_text_config()) for layer in base.layers]
        windows = windows or [None] * len(parts)
        self.layers = []
        of_delta = None
        for part, window in zip(parts, windows, strict=True):
            before_attention, after_attention, before_mlp, after_mlp = part.norms
            self.layers.append(
                Layer(
                    first_norm=of.add_and_norm(before_attention, of_delta),
                    qkv=split(project(*part.qkv), part.qkv_sizes),
                    turn=of.turn(part),
                    attend=attend(window),
                    o_proj=project(part.o_proj),
                    second_norm=of.add_and_norm(before_mlp, after_attention),
                    gate_and_up=halves(project(*part.gate_up)),
                    gated=of.gated(part),
                    down_proj=project(part.down_proj),
                    head_size=part.head_size,
                    scale=part.scale,
                    angles=part.angles,
                    window=window,
                )
            )
            of_delta = after_mlp
        self.kinds = {layer.angles for layer in self.layers}
        self.last_norm = of.add_and_norm(base.norm, of_delta)

    def __call__(
        self,
        cache: Sequence[Any],
        token_A: Tensor,
        position_A1: Tensor,
        masks: Mapping[int | None, Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states [A, 1, H] of one token per sequence: ids int64 [A] at positions int64 [A, 1].

        `cache`: one per layer, with `update(keys, values)` as in transformers. `masks`: by window, [A, X], 0 on
        positions that are not attended to.
        """
        x_A1H = self.embed(token_A[:, None])
        of_kind = {
            kind: self.operations.angles(*self.rotary(x_A1H, position_A1, *([] if kind is None else [kind])))
            for kind in self.kinds
        }
        unseen = {window: _unseen(mask_AX, x_A1H.dtype) for window, mask_AX in (masks or {}).items()}
        rows = len(token_A)
        delta_A1H = None  # what the layer before adds
        for layer, states in zip(self.layers, cache, strict=True):
            size, unseen_A11X = layer.head_size, unseen.get(layer.window)
            x_A1H, normal_A1H = layer.first_norm(x_A1H, delta_A1H)
            q, k, v = layer.qkv(normal_A1H)
            q, k = layer.turn(q.view(rows, -1, size), k.view(rows, -1, size), of_kind[layer.angles])
            v = v.view(rows, -1, 1, size)
            keys_AKXD, values_AKXD = states.update(k.unsqueeze(2), v)
            # The query heads of a key head take the dimension of positions: one pass over the keys is enough for all.
            q_AKQD = q.view(rows, v.shape[1], -1, size)
            found = layer.attend(q_AKQD, keys_AKXD, values_AKXD, attn_mask=unseen_A11X, scale=layer.scale)
            x_A1H, normal_A1H = layer.second_norm(x_A1H, layer.o_proj(found.reshape(rows, 1, -1))[0])
            gate, up = layer.gate_and_up(normal_A1H)
            delta_A1H = layer.down_proj(layer.gated(gate, up))[0]
        return self.last_norm(x_A1H, delta_A1H)[1]


def _unseen(mask_AX: Tensor, dtype: torch.dtype) -> Tensor:
    unseen_AX = torch.zeros_like(mask_AX, dtype=dtype).masked_fill_(mask_AX == 0, -torch.inf)
    return unseen_AX[:, None, None]


def split(products: Projections, sizes: Sequence[int]) -> Projections:
    """Queries, keys and values, also of one layer for all of them."""

    def run(x: Tensor) -> Sequence[Tensor]:
        found = products(x)
        return found if len(found) > 1 else found[0].split(tuple(sizes), dim=-1)

    return run


def halves(products: Projections) -> Projections:
    """Gate and up, also of one layer for both."""

    def run(x: Tensor) -> Sequence[Tensor]:
        found = products(x)
        return found if len(found) > 1 else found[0].chunk(2, dim=-1)

    return run


def with_fixed_frequencies(rotary: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """A rotary embedding without the look at how long the longest sequence is, for which the host would wait."""
    kinds: Any = getattr(rotary, "rope_type", None)
    looks = "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,))
    return partial(inspect.unwrap(type(rotary).forward), rotary) if looks else rotary


def operations(last_norm: nn.Module) -> Operations:
    """Those that `fuse` gave the modules of a model, where they apply; else plain ones."""
    ask = getattr(last_norm, "operations", None)
    return (ask and ask()) or Plain()


class Plain:
    """See `Operations`."""

    def add_and_norm(self, norm: nn.Module | None, of_delta: nn.Module | None) -> AddAndNorm:
        normal, normal_delta = _norm(norm), _norm(of_delta)

        def run(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
            total = x if delta is None else x + normal_delta(delta)
            return total, normal(total)

        return run

    def turn(self, parts: Parts) -> Turn:
        # Qwen 3 and Gemma 3 have norms of each head, OLMo 2 of all heads together.
        q_norm, k_norm = (_head_norm(getattr(parts.attention, name, None), parts) for name in ("q_norm", "k_norm"))

        def run(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
            q, k = q_norm(q), k_norm(k)
            return (rotated(q, *angles), rotated(k, *angles)) if parts.rotates else (q, k)

        return run

    def gated(self, parts: Parts) -> Gated:
        act = parts.act
        return lambda gate, up: act(gate) * up

    def angles(self, cos_A1D: Tensor, sin_A1D: Tensor) -> Angles:
        lower, upper = sin_A1D.chunk(2, dim=-1)
        return cos_A1D, torch.cat([-lower, upper], dim=-1)


def rotated(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), (a, b) -> (a cos - b sin, b cos + a sin).

    Rolling by half swaps a and b, and `signed_sin` already contains the minus. Of heads that are larger than `cos`, the
    rest stays as it is.
    """
    size = cos.shape[-1]
    if size < heads.shape[-1]:
        first, rest = heads.split([size, heads.shape[-1] - size], dim=-1)
        return torch.cat([rotated(first, cos, signed_sin), rest], dim=-1)
    # OLMo 2 has angles in float32, whatever the heads are in.
    return (heads * cos + heads.roll(size // 2, dims=-1) * signed_sin).to(heads.dtype)


def _head_norm(module: Any, parts: Parts) -> Callable[[Tensor], Tensor]:
    """Of heads [A, heads, D]."""
    norm = _norm(module)
    if module is None or module.weight.numel() == parts.head_size:
        return norm
    return lambda heads: norm(heads.flatten(1)).view_as(heads)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """RMSNorm (arXiv 1910.07467), y = w x / sqrt(mean(x^2) + eps) over n = H or D numbers; Gemma's weight is w - 1.

    In float32 it is computed as y = sqrt(n) w x / hypot(|x|, sqrt(eps n)): four operations instead of six, equal to
    rounding. In other precisions transformers rounds in between, so the module itself is returned. Without a module it
    is the identity.
    """
    if module is None:
        return lambda x: x
    if module.weight.dtype != torch.float32:
        return module  # type: ignore[no-any-return]
    size = module.weight.numel()
    of_gemma = isinstance(module, Gemma3RMSNorm)
    weight_H = (module.weight.detach() + of_gemma) * math.sqrt(size)
    eps = module.eps if of_gemma else module.variance_epsilon
    least = torch.tensor(math.sqrt(eps * size), device=weight_H.device)
    return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least) * weight_H
