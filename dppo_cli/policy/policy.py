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
from dppo_cli.errors import ConfigError, DataError, ModelError
from dppo_cli.policy.head import Head
from dppo_cli.types import Example, Messages, Prompt

BATCH = 256
"""Prompts tokenised at once. The fast tokenizers share a batch among their threads."""

BATCH_CHARACTERS = 2**20
"""Characters tokenised at once. A tokenizer may need 350 bytes for each, and ends the process when it gets none."""

UNKNOWN_POSITIONS = 2**20
"""The limit of a model that does not name one: more than can be trained on."""


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

    def encode(self, examples: Sequence[Example], prompting: Prompting) -> list[Prompt]:
        """Prompts as token ids; the only place where text is tokenised.

        Raises ModelError if there is no chat template or it refuses a prompt, and DataError for a prompt that gives no
        token, or so many that tokenising all of it could take all memory, and for a conversation without template.
        """
        prompts: list[Prompt] = []
        for batch in _batches(examples):
            if len(_text(batch[0])) > BATCH_CHARACTERS:
                self._check_beginning(len(prompts), _text(batch[0]), prompting)
            chats = [_conversation(example, prompting) for example in batch]
            token_ids = self._token_ids([_text(example) for example in batch], chats, prompting)
            for example, chat, ids in zip(batch, chats, token_ids, strict=True):
                if not ids:
                    raise DataError(
                        f"problem {len(prompts)} ({example.prompt[:60]!r}) gives no token; the tokenizer of "
                        f"{self.path} drops all of it"
                    )
                prompts.append(Prompt(len(prompts), example, tuple(ids), chat))
        return prompts

    def check_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise ConfigError if a prompt with its longest response does not fit into the model's positions."""
        limit = self.positions
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        if limit is not None and len(longest.token_ids) + max_new_tokens > limit:
            raise ConfigError(
                f"problem {longest.index} has {len(longest.token_ids)} tokens; with sampling.max_new_tokens="
                f"{max_new_tokens} that is more than the {limit} positions of {self.path}; lower it, or shorten the "
                "prompts"
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save_adapter(self, path: Path) -> None:
        """PEFT's format: adapter_model.safetensors and adapter_config.json."""
        assert self.peft is not None
        # The embeddings are the base's; asked to find out by itself, PEFT looks on the hub, at every save.
        self.peft.save_pretrained(str(path), save_embedding_layers=False)

    def _check_beginning(self, index: int, text: str, prompting: Prompting) -> None:
        """Raise DataError for a long prompt whose beginning alone has more tokens than the model can hold.

        A bound on characters would be wrong: normalisation drops any number of them, and an unknown word of any length
        can be one token.
        """
        limit = self.positions or UNKNOWN_POSITIONS
        beginning = text[: max(BATCH_CHARACTERS, 8 * limit)]
        (token_ids,) = self._token_ids([beginning], [_conversation(Example(beginning, ""), prompting)], prompting)
        # Cut in the middle of a word, it may have some tokens more than the same characters have in the whole prompt.
        if len(token_ids) > limit + 1000:
            raise DataError(
                f"problem {index} has {len(text):,} characters, and the first {len(beginning):,} of them alone have "
                f"{len(token_ids):,} tokens; that is more than the {limit:,} positions of {self.path}; shorten it"
            )

    def _token_ids(self, texts: list[str], chats: Sequence[Messages], prompting: Prompting) -> list[list[int]]:
        if prompting.template == "plain":
            return list(self.tokenizer(texts)["input_ids"])
        if self.tokenizer.chat_template is None:
            raise ModelError(f"the tokenizer of {self.path} has no chat template; use prompt.template=plain")
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                [list(map(dict, chat)) for chat in chats],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                **prompting.template_kwargs,
            )
        except Exception as error:  # A template is a program.
            raise ModelError(
                f"the chat template of {self.path} refuses the prompt: {' '.join(str(error).split())}"
            ) from None
        return list(rendered["input_ids"])


def _conversation(example: Example, prompting: Prompting) -> Messages:
    """What the chat template is given; empty without one. A system message of the example's own goes before ours."""
    if prompting.template == "plain":
        if example.messages:
            raise DataError("the prompts are conversations (lists of messages), which need prompt.template=chat")
        return ()
    messages = example.messages or [{"role": "user", "content": example.prompt}]
    if prompting.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": prompting.system}, *messages]


def _text(example: Example) -> str:
    """All that will be tokenised of an example, but for what a template adds."""
    return "\n".join(m["content"] for m in example.messages) if example.messages else example.prompt


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The examples in order, many short ones or few long ones at a time; one that is too long for a batch alone."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        if batch and (len(batch) == BATCH or size + len(_text(example)) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += len(_text(example))
    if batch:
        yield batch


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
