"""The prompts of a step, as far as they are at hand quickly; else prompts of an assumed length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Thread

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError, DppoError
from dppo_cli.policy.encoder import UNKNOWN_POSITIONS, Encoder
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.sampling import Wanted
from dppo_cli.types import Example, Prompt

PATIENCE = 10.0
"""Seconds for the data to be read; data of the hub may have to be downloaded first."""
LOOKED_AT = 4096
"""Problems whose prompts are tokenised."""
ASSUMED = 256
"""Tokens of a prompt where nothing is known. GSM8K's problems have some hundred, with a chat template."""


@dataclass(frozen=True)
class Prompts:
    """Of a step with the longest prompt first, and of the evaluation, longest first. `source`: where they are from."""

    step: Sequence[Prompt]
    heldout: Sequence[Prompt]
    source: str

    @property
    def mean(self) -> float:
        return sum(len(p.token_ids) for p in self.step) / len(self.step)

    @property
    def longest(self) -> int:
        return max(len(p.token_ids) for p in (*self.step, *self.heldout))


def find_prompts(config: TrainConfig, policy: Policy, tokens: int | None) -> Prompts:
    """`tokens`: the length that the user says prompts have. Raises ConfigError for those that the model cannot hold."""
    if tokens is not None:
        return _assumed(config, policy, tokens, f"prompt_tokens={tokens}")
    why = f"the tokenizer of {policy.path} is not at hand"
    task = None
    if policy.tokenizer is not None:
        task, why = _load(config)
    if task is None:
        room = UNKNOWN_POSITIONS if policy.positions is None else policy.positions
        tokens = max(1, min(ASSUMED, room - config.sampling.max_new_tokens))
        return _assumed(config, policy, tokens, f"{tokens} tokens assumed: {why}")
    encoder = Encoder(policy.tokenizer, policy.path, policy.positions)
    train, heldout = (
        encoder.fitting(
            encoder.encode(list(examples)[:LOOKED_AT], config.prompt),
            config.sampling.max_new_tokens,
            config.prompt.too_long,
            lambda text: None,
        )
        for examples in (task.train, task.heldout)
    )
    by_length, heldout = (sorted(of, key=lambda prompt: -len(prompt.token_ids)) for of in (train, heldout))
    others = random.Random(config.seed).choices(by_length, k=config.batch.prompts_per_step - 1)
    return Prompts([by_length[0], *others], heldout, f"the data's, {len(train)} of them")


def later_turn(wanted: Wanted) -> Wanted:
    """The call for a later turn of `wanted`, half of each response being there."""
    tokens = wanted.sampling.max_new_tokens
    there = tokens // 2
    contexts = [replace(p, token_ids=(*p.token_ids, *[p.token_ids[-1]] * there)) for p in wanted.prompts]
    sampling = replace(wanted.sampling, max_new_tokens=tokens - there)
    each = [context for context in contexts for _ in range(wanted.group)]
    return replace(wanted, prompts=each, group=1, sampling=sampling)


def _load(config: TrainConfig) -> tuple[Task | None, str]:
    """The data, or why it is not at hand."""
    found: list[Task] = []
    failed: list[str] = []

    def load() -> None:
        try:
            found.append(config.data.load(lambda text: None))
        except DppoError as error:
            failed.append(str(error))
        except Exception as error:  # of a user's own data source
            failed.append(f"{type(error).__name__}: {error}")

    # A download that takes long ends with this process.
    thread = Thread(target=load, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if found:
        return found[0], ""
    return None, failed[0] if failed else f"the data is not there after {PATIENCE:g} seconds"


def _assumed(config: TrainConfig, policy: Policy, tokens: int, source: str) -> Prompts:
    length = config.sampling.max_new_tokens
    if policy.positions is not None and tokens + length > policy.positions:
        raise ConfigError(
            f"prompts of {tokens} tokens with sampling.max_new_tokens={length} are more than the {policy.positions} "
            f"positions of {policy.path}; lower one of the two"
        )
    step, heldout = config.batch.prompts_per_step, getattr(config.data, "eval_problems", None)
    # As many as can run at once, where the data does not say that there are fewer.
    most = config.rollout.concurrent_sequences if isinstance(config.rollout, LocalRollout) else step
    heldout = min(most, heldout or most)
    prompts = assumed_prompts(max(step, heldout), tokens)
    return Prompts(prompts[:step], prompts[:heldout], source)


def assumed_prompts(count: int, tokens: int) -> list[Prompt]:
    """Prompts of a length, no two of which begin alike."""
    return [Prompt(i, Example("", ""), (i, *[0] * (tokens - 1))) for i in range(count)]
