"""The policy in training: a frozen causal language model with a LoRA adapter, its tokenizer and its device."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dppo_cli.config.sections import Prompting
from dppo_cli.errors import ModelError
from dppo_cli.policy.encoder import Encoder
from dppo_cli.policy.head import Head
from dppo_cli.types import Example, Prompt


@dataclass(frozen=True, eq=False)
class Policy:
    """`model` is the adapted language model itself; `peft` the same model in PEFT's wrapper, None without an adapter.

    `path`: where the base came from. `eos_ids`: tokens that end a response.
    """

    model: PreTrainedModel
    peft: PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    path: str
    device: torch.device
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    pad_id: int

    @property
    def head(self) -> Head:
        """The output layer at temperature 1."""
        return model_head(self.model)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained: the adapter's weights, float32."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter in memory, and nearly so in a file."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    def autocast(self) -> AbstractContextManager[Any]:
        """Runs the float32 adapter in the base's precision where that is a lower one."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switch the adapter off within the context. The base is the reference of KL(pi || ref); it needs no memory."""
        assert self.peft is not None
        with self.peft.disable_adapter():
            yield

    @property
    def positions(self) -> int | None:
        """How many tokens the model can hold; None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.path, self.positions)

    def encode(self, examples: Sequence[Example], prompting: Prompting) -> list[Prompt]:
        """Prompts as token ids; see `Encoder`."""
        return self.encoder.encode(examples, prompting)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save_adapter(self, path: Path) -> None:
        """PEFT's format: adapter_model.safetensors and adapter_config.json."""
        assert self.peft is not None
        # The embeddings are the base's; asked to find out by itself, PEFT looks on the hub, at every save.
        self.peft.save_pretrained(str(path), save_embedding_layers=False)


def model_head(model: PreTrainedModel) -> Head:
    """The output layer of a causal language model as a `Head`.

    Raises ModelError if the model has none, or does something to its logits that `Head` does not know: the head's
    log-probs are compared with the model's own once, when it is loaded (`check_head`).
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output layer; it is not a causal language model")
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1.0 / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), float(scale), softcap)
