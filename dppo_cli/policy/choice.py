"""Which `Forward` the updates of a model run through."""

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.layer_parts import windows_of
from dppo_cli.kernels.segment_kernels import why_not_flash
from dppo_cli.policy.forward import Forward, SharedPrompts, WholeSequences, shared_tokens
from dppo_cli.policy.packed_forward import PackedGroups, can_pack
from dppo_cli.policy.policy import Policy

PACKED_TOKEN = 0.95
"""What a token of a row costs of one beside padding. Without masks and copies of keys and values it was 8% less on a
CPU; on an H100 an update of Llama 3.1 8B took 16% less for 3% fewer tokens."""
NOT_PACKED = (
    "updates pad responses, and may run a prompt for each of them: torch's flash attention does not work here: {}"
)


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
    longest = max(prompt + own for _, prompt, own in samples)
    kind = choose_forward(policy, longest)
    if kind is not SharedPrompts or not packs_well(policy.model, policy.device, policy.dtype, longest):
        return kind
    own = [tokens for *_, tokens in samples]
    # Forward and backward passes.
    packed, shared = 2 * sum(own), 3 * shared_tokens(list(prompts.values()))
    for part in PackedGroups.split(samples, budget):
        packed += 2 * sum(len(prompts[number]) for number in {samples[i][0] for i in part})
    for part in SharedPrompts.split(samples, budget):
        shared += 2 * len(part) * max(own[i] for i in part)
    return PackedGroups if PACKED_TOKEN * packed < shared else SharedPrompts


def choose_forward(policy: Policy, longest: int) -> type[Forward]:
    """`SharedPrompts` where responses can continue from their prompt's keys and values in training.

    transformers keeps none under gradient checkpointing, and layers other than attention have none. Under gradient
    checkpointing `PackedGroups` shares prompts, too, where the model's layers are known. `longest`: tokens of a
    sequence.
    """
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=policy.model.config).layers
    # transformers' own property for it was renamed between the versions that are supported.
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules())
    if recomputes and packs_well(policy.model, policy.device, policy.dtype, longest):
        return PackedGroups
    shares = not recomputes and all(type(layer) in attention for layer in layers)
    return SharedPrompts if shares else WholeSequences


def packs_well(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, longest: int) -> bool:
    """Whether rows of segments can be run, and attention over them makes no matrix of all scores."""
    if not can_pack(model):
        return False
    return device.type == "cpu" or (
        device.type == CUDA and all(why is None for why in _refusals(model, dtype, longest))
    )


def warn_of_padding(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, warn: Callable[[str], None]
) -> None:
    """`warn` is told if updates should be packed on this device, and cannot be."""
    if device.type == CUDA and can_pack(model):
        longest: int = model.config.get_text_config().max_position_embeddings
        why = next((why for why in _refusals(model, dtype, longest) if why), None)
        if why is not None:
            warn(NOT_PACKED.format(why))


def _refusals(model: PreTrainedModel, dtype: torch.dtype, longest: int) -> list[str | None]:
    """Of layers without a window, and of those with one that a sequence passes: see `why_not_flash`."""
    of = model.config.get_text_config()
    size = getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
    heads = of.num_attention_heads, of.num_key_value_heads
    passed = {window is not None and window < longest for window in windows_of(model) or ()}
    return [why_not_flash(dtype, *heads, size, windows=windows) for windows in sorted(passed)]
