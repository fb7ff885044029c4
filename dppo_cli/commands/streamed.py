"""Sampling for people: one response at a time, by transformers, shown as it grows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from dppo_cli.config.sections import Sampling
from dppo_cli.environment.environment import INLINE, Environment, Reply
from dppo_cli.errors import NumericalError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.completions import completion
from dppo_cli.types import Completion, Messages, PolicyReport, Prompt


class Streamed:
    """See `RolloutEngine`, of which this is what a call of one sample needs. It reports no log-probs.

    `show`: is handed text, as soon as later tokens cannot change it.
    """

    samples_with = "transformers' generate"

    def __init__(self, policy: Policy, show: Callable[[str], None]) -> None:
        self.policy, self.show = policy, show

    def __enter__(self) -> "Streamed":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sync(self, version: int) -> None:
        pass

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Raises NumericalError if the policy's logits are NaN."""
        (prompt,) = prompts
        torch.manual_seed(seed)
        policy = self.policy
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        if sampling.stop:
            options["stop_strings"] = sampling.stop
        prompt_1L = torch.tensor([prompt.token_ids], device=policy.device)
        model: Any = policy.model
        with torch.no_grad(), policy.autocast():
            out_1T = model.generate(
                prompt_1L,
                GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=list(policy.eos_ids),
                    pad_token_id=policy.pad_id,
                    **options,
                ),
                attention_mask=torch.ones_like(prompt_1L),
                logits_processor=[_refuse_nan],
                streamer=_Stream(policy, self.show),
                tokenizer=policy.tokenizer,
            )
        token_T = out_1T[0, len(prompt.token_ids) :]
        yield 0, [completion(policy, token_T, PolicyReport(torch.zeros(len(token_T))), sampling.stop, version=0)]


class Heard:
    """An environment whose replies are shown, too."""

    def __init__(self, environment: Environment, show: Callable[[str], None]) -> None:
        self.environment, self.show = environment, show
        self.role, self.stop, self.schemas = environment.role, environment.stop, environment.schemas
        self.turns, self.turn_tokens = environment.turns, environment.turn_tokens

    def begin(self, prompt: Prompt, said: Messages, turn: int) -> Callable[[], Reply]:
        pending = self.environment.begin(prompt, said, turn)

        def reply() -> Reply:
            found = pending()
            for message in found.messages:
                self.show(spoken(message))
            return found

        return reply

    def give_up(self) -> None:
        self.environment.give_up()


def spoken(message: Mapping[str, str]) -> str:
    """A message in a conversation that is shown as one text: what is not the model's has its role before it."""
    content = message["content"]
    return content if message["role"] == INLINE else f"\n[{message['role']}] {content}\n"


class _Stream(TextStreamer):
    """Hands on what transformers has decoded, as soon as later tokens cannot change it."""

    def __init__(self, policy: Policy, show: Callable[[str], None]) -> None:
        super().__init__(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def _refuse_nan(ids_1T: torch.Tensor, logits_1V: torch.Tensor) -> torch.Tensor:
    if logits_1V.isnan().any():
        raise NumericalError("the logits of the policy are NaN: its weights are broken")
    return logits_1V
