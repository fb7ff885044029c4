"""Several sources as one: shares, order, names, and what each member says."""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import pytest
from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.data.mixture import Mixture
from dppo_cli.data.task import Task, Warn
from dppo_cli.errors import ConfigError, DataError
from dppo_cli.types import Example


@dataclass(frozen=True)
class Given:
    """A source of prompts that are given."""

    train: tuple[str, ...]
    heldout: tuple[str, ...] = ("h",)

    def load(self, warn: Warn) -> Task:
        if not self.train:
            raise DataError("x.jsonl is empty")
        warn("loaded")
        return Task(*([Example(prompt, "1", {"level": 2}) for prompt in part] for part in (self.train, self.heldout)))


def prompts(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{n}" for n in range(count))


def load(mixture: Mixture) -> tuple[Task, list[str]]:
    told: list[str] = []
    return mixture.load(told.append), told


def test_without_weights_all_is_taken_evenly_spread() -> None:
    members = {"a": Given(prompts("a", 6)), "b": Given(prompts("b", 3), ("k", "l"))}
    task, told = load(Mixture(members, None))
    assert [e.prompt for e in task.train] == ["a0", "b0", "a1", "a2", "b1", "a3", "a4", "b2", "a5"]
    assert [e.prompt for e in task.heldout] == ["h", "k", "l"]
    assert [e.columns for e in task.heldout] == [{"level": 2, "source": name} for name in "abb"]
    assert task.train[1] == Example("b0", "1", {"level": 2, "source": "b"})
    assert told == ["data.members.a: loaded", "data.members.b: loaded"]


def test_weights_are_the_shares_of_what_is_taken() -> None:
    members = {"a": Given(prompts("a", 100)), "b": Given(prompts("b", 100)), "c": Given(prompts("c", 10))}
    task, told = load(Mixture(members, {"a": 3.0, "b": 1.5, "c": 0.5}))
    sources = [e.columns["source"] for e in task.train]
    assert Counter(sources) == {"a": 63, "b": 32, "c": 10}  # until an eleventh of c is due
    assert len({e.prompt for e in task.train}) == 105, "none is taken twice"
    # Evenly: after any number of problems, each member is within one of its share.
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        counts = accumulate(source == name for source in sources)
        assert all(abs(count - share * n) <= 1 for n, count in enumerate(counts, 1))
    assert told[-1] == "a: 63 of 100 training problems; b: 32 of 100 training problems; c: 10 of 10 training problems"
    assert load(Mixture(members, {"a": 3.0, "b": 1.5, "c": 0.5})) == (task, told)


@pytest.mark.parametrize(("small", "large"), [(1, 1), (1, 7), (2, 3), (5, 1000)])
def test_sizes_as_weights_leave_nothing(small: int, large: int) -> None:
    members = {"a": Given(prompts("a", small)), "b": Given(prompts("b", large))}
    assert Counter(e.prompt for e in load(Mixture(members, None))[0].train) == Counter(
        prompts("a", small) + prompts("b", large)
    )


def test_what_one_member_holds_out_no_other_trains_on() -> None:
    task, told = load(Mixture({"a": Given(("x", "y")), "b": Given(("u", "v"), ("y",))}, None))
    assert {e.prompt for e in task.train} == {"x", "u", "v"}
    assert "1 of 2 training problems of a are held-out problems, too, and were dropped" in told


def test_a_member_that_fails_is_named() -> None:
    with pytest.raises(DataError, match=r"^data\.members\.b: x\.jsonl is empty$"):
        load(Mixture({"a": Given(("x",)), "b": Given(())}, None))


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        ("", None, "data.members is empty; name its sources: data.members.NAME=gsm8k, and so on"),
        ("ab", {"a": 1.0}, "data.weights names a, and data.members are a, b; give each member its weight"),
        ("a", {"a": 1.0, "c": 1.0}, "data.weights names a, c, and data.members are a; give each member its weight"),
        ("a", {}, "data.weights names nothing, and data.members are a"),
        ("ab", {"a": 1.0, "b": 0.0}, "data.weights.b=0.0 breaks the rule weight > 0; leave the member out"),
        ("a", {"a": float("nan")}, "data.weights.a=nan breaks the rule weight > 0"),
    ],
)
def test_members_and_weights_that_do_not_match(names: str, weights: dict[str, float] | None, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Mixture({name: Given(("x",)) for name in names}, weights)
    assert words in str(error.value)


def test_a_mixture_in_words() -> None:
    """Each member is a choice of the group, with its own keys."""
    words = ["data=mixture", "+data@data.members.sums=arithmetic", "data.members.sums.train_problems=30"]
    words += ["+data@data.members.school=gsm8k", "data.weights={sums: 2, school: 1}"]
    data = build(TrainConfig, OmegaConf.create(OmegaConf.to_container(composed("train", *words)))).data
    assert isinstance(data, Mixture)
    assert (data.members["sums"].train_problems, data.members["school"].name) == (30, "openai/gsm8k")  # type: ignore[attr-defined]
    assert data.weights == {"sums": 2.0, "school": 1.0}
