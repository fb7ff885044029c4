"""Which `Forward` the updates of a model run through."""

from collections.abc import Mapping, Sequence

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.layer_parts import windows_of
from dppo_cli.kernels.segment_kernels import has_flash
from dppo_cli.policy.forward import Forward, SharedPrompts, WholeSequences, shared_tokens
from dppo_cli.policy.packed_forward import PackedGroups, can_pack
from dppo_cli.policy.policy import Policy

PACKED_TOKEN = 0.95
"""What a token of a row costs of one beside padding. Without masks and copies of keys and values it was 8% less on a
CPU; on an H100 an update of Llama 3.1 8B took 16% less for 3% fewer tokens."""


def choose_for(
    policy: Policy,
    prompts: Mapping[int, Sequence[int]],
    samples: Sequence[tuple[int, int, int]],
    budget: int,
) -> type[Forward]:
    """`choose_forward`, but `PackedGroups` instead of `SharedPrompts` where it is less work.

    `samples`: as `Forward.split` takes them.

    A packed prompt runs in each micro-batch that has responses to it, a shared one once more for the backward pass, and
    what shared prompts begin with runs once.
    """
    kind = choose_forward(policy)
    if kind is not SharedPrompts or not can_pack(policy.model) or not _has_flash(policy):
        return kind
    own = [tokens for *_, tokens in samples]
    # Forward and backward passes.
    packed, shared = 2 * sum(own), 3 * shared_tokens(list(prompts.values()))
    for part in PackedGroups.split(samples, budget):
        packed += 2 * sum(len(prompts[number]) for number in {samples[i][0] for i in part})
    for part in SharedPrompts.split(samples, budget):
        shared += 2 * len(part) * max(own[i] for i in part)
    return PackedGroups if PACKED_TOKEN * packed < shared else SharedPrompts


def choose_forward(policy: Policy) -> type[Forward]:
    """`SharedPrompts` where responses can continue from their prompt's keys and values in training.

    transformers keeps none under gradient checkpointing, and layers other than attention have none. Under gradient
    checkpointing `PackedGroups` shares prompts, too, where the model's layers are known.
    """
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=policy.model.config).layers
    # transformers' own property for it was renamed between the versions that are supported.
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules())
    if recomputes and can_pack(policy.model):
        return PackedGroups
    shares = not recomputes and all(type(layer) in attention for layer in layers)
    return SharedPrompts if shares else WholeSequences


def _has_flash(policy: Policy) -> bool:
    """Whether attention over segments runs without a matrix of all its scores."""
    of = policy.model.config.get_text_config()
    size = getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
    windows = any(windows_of(policy.model) or ())
    heads = of.num_attention_heads, of.num_key_value_heads
    on_cuda = policy.device.type == CUDA
    return policy.device.type == "cpu" or (on_cuda and has_flash(policy.device, policy.dtype, *heads, size, windows))
