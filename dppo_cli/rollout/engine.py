"""The rollout engine as the loop sees it: token ids in, token ids and log-probs out, wherever it runs."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from dppo_cli.config.sections import LoRA, Sampling
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Completion, Prompt


class RolloutEngine(Protocol):
    """Samples from one version of the policy. Opened (`with engine:`), synced, asked to generate, closed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def samples_with(self) -> str:
        """The weights and their precision, in words."""
        ...

    def sync(self, version: int) -> None:
        """Take over the policy's adapter as it is now, before the first use, too; completions then carry `version`."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The number of a prompt and its completions, as soon as they have all ended, so in any order.

        Each prompt comes once. Equal calls give equal tokens. Until the iterator is used up or forgotten, neither the
        engine nor the policy is used for anything else.

        `numbers`: each prompt's number in the whole of which these are a part; None: 0, 1, 2, ... A prompt's random
        numbers follow from `seed` and its number there.

        A list has `samples_per_prompt` completions, or fewer or more where an engine lost some or had some left.
        Log-probs are those of the tempered, untruncated distribution. `num_logprobs`: 0, the K of a top-K report, or
        `WHOLE_VOCABULARY`.
        """
        ...


def in_each_process(source: "RolloutSource") -> bool:
    """Whether each of several processes has an engine of its own."""
    return bool(getattr(source, "in_each_process", True))


def steps_ahead(source: "RolloutSource") -> int:
    """How many steps ahead of the trainer the engine samples; 0: in step."""
    return int(getattr(source, "ahead", 0))


def seeds_of(prompts: Sequence[Prompt], seed: int, numbers: Sequence[int] | None) -> list[int]:
    """A seed for each prompt; see `RolloutEngine.generate`."""
    return [derive_seed(seed, number) for number in (range(len(prompts)) if numbers is None else numbers)]


def derive_seed(seed: int, step: int | str) -> int:
    """A seed of its own for every step, or part of one, of every run seed."""
    return random.Random(f"{seed}:{step}").getrandbits(63)


def in_order(generated: Iterable[tuple[int, list[Completion]]]) -> list[list[Completion]]:
    """All that `RolloutEngine.generate` gives, in the order of its prompts.

    Example:
        >>> in_order(iter([(1, ["b"]), (0, ["a", "a"])]))
        [['a', 'a'], ['b']]
    """
    return [completions for _, completions in sorted(generated, key=lambda numbered: numbered[0])]


class RolloutSource(Protocol):
    """A rollout option.

    A class that has `in_each_process = False` is loaded in the main process of several alone, and samples for all. An
    object that has `ahead` more than 0 samples so many steps ahead of the trainer: `generate` of its engine begins when
    it is called, and keeps to the version that it began with.
    """

    def check(self, num_logprobs: int, adapter: LoRA | None) -> None:
        """Raise ConfigError if this engine cannot report what the approximation needs, or cannot run the adapter."""
        ...

    def load(self, policy: Policy, warn: Callable[[str], None]) -> RolloutEngine:
        """An engine that is still to be opened. `warn` is told what works but is unusual."""
        ...
