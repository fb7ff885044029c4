"""What the decoder layers of the families that are known here consist of.

A layer adds to x what its attention makes of it, then what its MLP makes of that, with norms n_1 to n_4:
    x + n_2(attention(n_1(x))),  then  x + n_4(mlp(n_3(x))).
Llama, Mistral, Qwen, Phi-3 and SmolLM3 have n_1 and n_3, OLMo 2 has n_2 and n_4, Gemma 3 has all of them. The attention
is softmax(s q k^T) v, with queries and keys that are rotated as far as the family rotates them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
"""Names of n_1 to n_4."""
NORMS: dict[type[nn.Module], tuple[str | None, ...]] = {
    LlamaDecoderLayer: BEFORE,
    MistralDecoderLayer: BEFORE,
    Qwen2DecoderLayer: BEFORE,
    Qwen3DecoderLayer: BEFORE,
    Phi3DecoderLayer: BEFORE,
    SmolLM3DecoderLayer: BEFORE,
    Olmo2DecoderLayer: (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    Gemma3DecoderLayer: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


@dataclass(frozen=True)
class Parts:
    """`qkv` and `gate_up`: the linear layers that read one input, each apart or one for all of them."""

    norms: tuple[nn.Module | None, ...]
    attention: nn.Module
    qkv: tuple[nn.Module, ...]
    qkv_sizes: tuple[int, ...]
    o_proj: nn.Module
    gate_up: tuple[nn.Module, ...]
    down_proj: nn.Module
    act: Callable[[Tensor], Tensor]
    head_size: int
    scale: float
    rotates: bool
    angles: str | None
    """Which rotary frequencies, where a model has several."""


def is_known(model: PreTrainedModel) -> bool:
    """Whether all layers are of families above, and their attention is torch's."""
    layers = getattr(model.base_model, "layers", ())
    of = model.config.get_text_config()
    plain = not getattr(of, "attn_logit_softcapping", None) and not getattr(of, "use_bidirectional_attention", False)
    known = bool(layers) and all(type(layer) in NORMS for layer in layers)
    return known and plain and model.config._attn_implementation == "sdpa"


def parts_of(layer: Any, config: Any) -> Parts:
    """Of a layer of a known family; `config`: that of the model's text."""
    attention, mlp = layer.self_attn, layer.mlp
    size = attention.head_dim
    joined = hasattr(attention, "qkv_proj")
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
    return Parts(
        norms=tuple(None if name is None else getattr(layer, name) for name in NORMS[type(layer)]),
        attention=attention,
        qkv=(attention.qkv_proj,) if joined else (attention.q_proj, attention.k_proj, attention.v_proj),
        qkv_sizes=tuple(size * count for count in heads),
        o_proj=attention.o_proj,
        gate_up=gate_up,
        down_proj=mlp.down_proj,
        act=act_of(mlp),
        head_size=size,
        scale=attention.scaling,
        # SmolLM3 has layers without rotation.
        rotates=bool(getattr(attention, "use_rope", True)),
        angles=getattr(attention, "layer_type", None) if type(layer) is Gemma3DecoderLayer else None,
    )


def act_of(mlp: Any) -> Callable[[Tensor], Tensor]:
    """The activation of the gate."""
    return mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn  # type: ignore[no-any-return]


def windows_of(model: PreTrainedModel) -> list[int | None] | None:
    """How many positions the attention of each layer sees, the token's own among them; None for one that sees all.

    None instead of the list where a layer keeps something else than keys and values.
    """
    found: list[int | None] = []
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            found.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            found.append(None)
        else:
            return None
    return found


def sees_all(model: PreTrainedModel, positions: int) -> bool:
    """Whether each layer's attention sees all of so many positions, and there is no other state."""
    windows = windows_of(model)
    return windows is not None and all(window is None or window >= positions for window in windows)
