"""Reward 1 for the right number in the notation of GSM8K, `#### 72`, else 0."""

from collections.abc import Callable
from dataclasses import dataclass

from dppo_cli.config.checks import check_choice
from dppo_cli.reward.numbers_in_text import NUMBER, last_number
from dppo_cli.reward.numeric import NumericScorer
from dppo_cli.reward.scorer import Scorer

MARK = "####"


@dataclass(frozen=True)
class GSM8K:
    """See conf/reward/gsm8k.yaml for the fields."""

    extract: str

    def __post_init__(self) -> None:
        check_choice("reward.extract", self.extract, ("strict", "flexible"))

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return NumericScorer(right_answer, self._found, 0.0, 0.0, warn)

    def _found(self, text: str) -> str | None:
        if self.extract == "flexible":
            return last_number(text)
        _, mark, rest = text.rpartition(MARK)
        found = NUMBER.match(rest.lstrip()) if mark else None
        return found.group() if found else None


def right_answer(answer: str) -> str:
    """The number of an answer, which may be a whole solution of the data set."""
    return answer.rpartition(MARK)[2]
