"""Several data sources as one, in shares that the user names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dppo_cli.data.examples import without
from dppo_cli.data.task import DataSource, Task, Warn
from dppo_cli.errors import ConfigError, DppoError
from dppo_cli.types import Example


@dataclass(frozen=True)
class Mixture:
    """`members` by name, and their `weights` by the same names (None: each gives all it has).

    Every example has a column `source` with its member's name.
    """

    members: dict[str, DataSource]
    weights: dict[str, float] | None

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("data.members is empty; name its sources: data.members.NAME=gsm8k, and so on")
        if self.weights is None:
            return
        if self.weights.keys() != self.members.keys():
            raise ConfigError(
                f"data.weights names {', '.join(self.weights) or 'nothing'}, and data.members are "
                f"{', '.join(self.members)}; give each member its weight"
            )
        for name, weight in self.weights.items():
            if not weight > 0:
                raise ConfigError(f"data.weights.{name}={weight} breaks the rule weight > 0; leave the member out")

    def load(self, warn: Warn) -> Task:
        """Load all members; no prompt that one of them holds out is trained on. Raises DataError as they do."""
        tasks = {name: self._load(name, source, warn) for name, source in self.members.items()}
        heldout = [example for name, task in tasks.items() for example in _named(task.heldout, name)]
        # What a member trains on and holds out itself is its user's choice.
        train = {
            name: without(_named(task.train, name), [e for e in heldout if e.columns["source"] != name], name, warn)
            for name, task in tasks.items()
        }
        mixed = list(_interleaved(train, self.weights or {name: len(part) for name, part in train.items()}))
        if self.weights is not None:
            used = {name: sum(e.columns["source"] == name for e in mixed) for name in train}
            warn("; ".join(f"{name}: {used[name]} of {len(part)} training problems" for name, part in train.items()))
        return Task(mixed, heldout)

    def _load(self, name: str, source: DataSource, warn: Warn) -> Task:
        try:
            return source.load(partial(_tell, warn, name))
        except DppoError as error:
            raise type(error)(f"data.members.{name}: {error}") from None


def _tell(warn: Warn, name: str, text: str) -> None:
    warn(f"data.members.{name}: {text}")


def _named(examples: Sequence[Example], name: str) -> list[Example]:
    return [replace(example, columns={**example.columns, "source": name}) for example in examples]


def _interleaved(parts: Mapping[str, Sequence[Example]], weights: Mapping[str, float]) -> Iterator[Example]:
    """Examples in the shares of `weights`, evenly spread, until the first part has no more: none is used twice."""
    taken = dict.fromkeys(parts, 0)
    while True:
        # The part that is furthest behind its share; of equals, the first.
        name = min(parts, key=lambda name: (taken[name] + 0.5) / weights[name])
        if taken[name] == len(parts[name]):
            return
        yield parts[name][taken[name]]
        taken[name] += 1
