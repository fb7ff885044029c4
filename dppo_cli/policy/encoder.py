"""From text to token ids."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dppo_cli.config.sections import Prompting
from dppo_cli.errors import ConfigError, DataError, ModelError
from dppo_cli.types import Example, Messages, Prompt

BATCH = 256
"""Prompts tokenised at once. The fast tokenizers share a batch among their threads."""

BATCH_CHARACTERS = 2**20
"""Characters tokenised at once. A tokenizer may need 350 bytes for each, and ends the process when it gets none."""

UNKNOWN_POSITIONS = 2**20
"""The limit of a model that does not name one: more than can be trained on."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """The only place where text is tokenised. `positions`: how many tokens the model of `path` can hold, if known."""

    tokenizer: PreTrainedTokenizerBase
    path: str
    positions: int | None

    def encode(self, examples: Sequence[Example], prompting: Prompting) -> list[Prompt]:
        """Prompts as token ids.

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

    def fitting(
        self, prompts: list[Prompt], max_new_tokens: int, too_long: str, warn: Callable[[str], None]
    ) -> list[Prompt]:
        """The prompts that fit into the model's positions together with their longest response; none is ever cut.

        `too_long`: refuse raises ConfigError for one that does not, drop leaves it out, and tells `warn` how many there
        are. Raises DataError if none is left.
        """
        limit = self.positions
        if limit is None:
            return prompts
        kept = [prompt for prompt in prompts if len(prompt.token_ids) + max_new_tokens <= limit]
        if len(kept) == len(prompts):
            return prompts
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        text = (
            f"problem {longest.index} has {len(longest.token_ids)} tokens; with sampling.max_new_tokens="
            f"{max_new_tokens} that is more than the {limit} positions of {self.path}; lower it, or shorten the prompts"
        )
        if too_long == "refuse":
            raise ConfigError(f"{text}, or leave out such problems with prompt.too_long=drop")
        if not kept:
            raise DataError(f"every problem is too long: {text}")
        warn(f"{len(prompts) - len(kept)} of {len(prompts)} problems are too long and left out ({text})")
        return kept

    def reply(self, messages: Messages, prompting: Prompting, eos_ids: Sequence[int], ended_by: int) -> list[int]:
        """Token ids that put `messages` after a turn of the model, and the beginning of its next turn.

        Those of the assistant go on with that turn. `ended_by`: the last token of that turn. If it is one of `eos_ids`,
        the end of the turn that the template writes is left out. Raises ModelError if the template refuses them.
        """
        if prompting.template == "plain" or messages[-1]["role"] == "assistant":
            text = "".join(message["content"] for message in messages)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # In a conversation whose text is known, so that what follows the model's turn can be told from it.
        mark = f"turn-{secrets.token_hex(16)}"
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        rendered = self._rendered([*before, *map(dict, messages)], prompting, tokenize=False)
        _, found, after = str(rendered).rpartition(mark)
        if not found:
            raise ModelError(f"the chat template of {self.path} leaves out what the model has said before a reply")
        ends = tuple(str(self.tokenizer.decode([token])) for token in eos_ids)
        # Some templates have a space before the end of a turn.
        after = after.lstrip() if after.lstrip().startswith(ends) else after
        ids = list(self.tokenizer(after, add_special_tokens=False)["input_ids"])
        return ids[1:] if ids and ids[0] in eos_ids and ended_by in eos_ids else ids

    def shows_tools(self, prompting: Prompting) -> bool:
        """Whether the chat template writes the tools that it is given."""
        chat = [{"role": "user", "content": "?"}]
        without = replace(prompting, template_kwargs={**prompting.template_kwargs, "tools": None})
        return bool(self._rendered(chat, prompting) != self._rendered(chat, without))

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
        rendered = self._rendered([list(map(dict, chat)) for chat in chats], prompting, tokenize=True)
        return list(rendered["input_ids"])

    def _rendered(self, chats: list[Any], prompting: Prompting, tokenize: bool = False) -> Any:
        """One conversation or several, with the beginning of the model's turn."""
        if self.tokenizer.chat_template is None:
            raise ModelError(f"the tokenizer of {self.path} has no chat template; use prompt.template=plain")
        try:
            return self.tokenizer.apply_chat_template(
                chats, tokenize=tokenize, add_generation_prompt=True, return_dict=tokenize, **prompting.template_kwargs
            )
        except Exception as error:  # A template is a program.
            raise ModelError(
                f"the chat template of {self.path} refuses the prompt: {' '.join(str(error).split())}"
            ) from None


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
