"""The weighted sum of several rewards."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dppo_cli.config.checks import check_rules, did_you_mean
from dppo_cli.errors import ConfigError
from dppo_cli.reward.scorer import EarlyScorer, RewardSource, Scorer
from dppo_cli.types import Completion, Prompt, Score


@dataclass(frozen=True)
class Mixture:
    """See conf/reward/mixture.yaml for the fields."""

    members: dict[str, RewardSource]
    weights: dict[str, float] | None

    def __post_init__(self) -> None:
        weights = self.weights or {}
        if not self.members:
            raise ConfigError(
                "reward.members is empty; add members, each a choice of reward: reward.members.answer=math"
            )
        for name in weights:
            if name not in self.members:
                raise ConfigError(f"reward.weights.{name} is of no member{did_you_mean(name, self.members)}")
        lacking = [name for name in self.members if self.weights is not None and name not in weights]
        if lacking:
            raise ConfigError(f"reward.weights has no number for {', '.join(lacking)}; give one for each member")
        check_rules("reward", self, {"weights are finite": all(math.isfinite(w) for w in weights.values())})

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return MixtureScorer({name: member.load(warn) for name, member in self.members.items()}, self.weights or {})


class MixtureScorer:
    """See `EarlyScorer`. The weight of a member that `weights` does not name is 1.

    A member that does not judge a sample is left out of its sum, as in TRL. What no member judges is not judged.
    """

    def __init__(self, members: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        self.members = members
        self.weights = {name: weights.get(name, 1.0) for name in members}
        self.early = [member for member in members.values() if isinstance(member, EarlyScorer)]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        scores = {name: member(prompts, completions) for name, member in self.members.items()}
        return [
            [self._sum({name: groups[i][j] for name, groups in scores.items()}) for j in range(len(group))]
            for i, group in enumerate(completions)
        ]

    def begin(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        for member in self.early:
            member.begin(prompt, completions)

    def give_up(self) -> None:
        for member in self.early:
            member.give_up()

    def _sum(self, scores: Mapping[str, Score]) -> Score:
        judged = [self.weights[name] * score.value for name, score in scores.items() if score.value is not None]
        parts: dict[str, float | None] = {}
        for name, score in scores.items():
            parts |= {name: score.value, **{f"{name}.{part}": value for part, value in score.parts.items()}}
        return Score(
            value=math.fsum(judged) if judged else None,
            parts=parts,
            note="; ".join(f"{name}: {score.note}" for name, score in scores.items() if score.note),
            answer=next((score.answer for score in scores.values() if score.answer is not None), None),
        )
