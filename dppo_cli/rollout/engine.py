"""The rollout engine as the loop sees it: token ids in, token ids and log-probs out, wherever it runs."""

from collections.abc import Sequence
from typing import Protocol

from dppo_cli.policy.policy import Policy
from dppo_cli.sections import LoRA, Sampling
from dppo_cli.types import Completion, Prompt


class RolloutEngine(Protocol):
    """Samples from one version of the policy."""

    def sync(self, version: int) -> None:
        """Take over the policy's adapter as it is now; completions carry `version` from here on."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, sampling: Sampling, num_logprobs: int, seed: int
    ) -> list[Completion]:
        """`samples_per_prompt` completions of each prompt, in the order of `prompts`; equal calls give equal tokens.

        Log-probs are those of the tempered, untruncated distribution. `num_logprobs`: 0, the K of a top-K report, or
        `WHOLE_VOCABULARY`.
        """
        ...


class RolloutSource(Protocol):
    """A rollout option."""

    def check(self, num_logprobs: int, adapter: LoRA | None) -> None:
        """Raise ConfigError if this engine cannot report what the approximation needs, or cannot run the adapter."""
        ...

    def load(self, policy: Policy) -> RolloutEngine: ...
