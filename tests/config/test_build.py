"""From a composed node to dataclasses: what is built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pictures import Collage, FineTip, Pen, Square, collage, picture, refused, square, target

from dppo_cli.algorithm.approx import TopK
from dppo_cli.algorithm.divergence import Divergence, TotalVariation
from dppo_cli.config.build import build


def test_a_target_becomes_its_class_and_a_section_its_dataclass() -> None:
    made = picture(pen={"width": 3, "colour": "red"})
    assert made.shape == Square("square", 2.0)
    assert made.pen == Pen(3, "red")


def test_targets_are_built_at_any_depth() -> None:
    made = picture(shape=collage(square(1), collage(square(2), last=square(3)), first=square(4))).shape
    inner = Collage("collage", [Square("square", 2.0)], {"last": Square("square", 3.0)})
    assert made == Collage("collage", [Square("square", 1.0), inner], {"first": Square("square", 4.0)})
    assert made.area() == 1 + (4 + 9) + 16


def test_targets_are_built_in_a_field_of_any_type() -> None:
    assert picture(extra=square()).extra == Square("square", 2.0)
    made = picture(extra={"a": [square(), "text"], "b": {"c": square(1)}, "d": 5}).extra
    assert made == {"a": [Square("square", 2.0), "text"], "b": {"c": Square("square", 1.0)}, "d": 5}
    assert picture(extra=["q_proj", "v_proj"]).extra == ["q_proj", "v_proj"]


def test_an_optional_object_may_be_null_or_there() -> None:
    assert picture(frame=None).frame is None
    assert picture(frame=square()).frame == Square("square", 2.0)


def test_a_section_may_be_a_class_derived_from_it() -> None:
    assert picture(pen=target(FineTip, width=1, colour=None, sharp=True)).pen == FineTip(1, None, True)
    assert "pen._target_=" in (line := refused(pen=square())) and "cannot be used as Pen" in line


def test_values_are_converted_to_what_their_hints_say() -> None:
    made = picture(sizes=[1, 2.5], title=7, pen={"width": "3", "colour": None})
    assert made.sizes == [1.0, 2.5] and isinstance(made.sizes[0], float)
    assert (made.title, made.pen.width) == ("7", 3)


def test_interpolations_are_resolved() -> None:
    assert picture(title="${pen.width} wide").title == "1 wide"
    assert refused(title="${nowhere.at.all}").startswith("title: Interpolation key 'nowhere.at.all' not found")


USERS_MODULE = """\
from __future__ import annotations

from dataclasses import dataclass

from dppo_cli.algorithm.approx import Approximation
from dppo_cli.algorithm.divergence import Divergence
from dppo_cli.config.build import FilePath


@dataclass(frozen=True)
class Mixture:
    parts: list[Divergence]
    by_name: dict[str, Approximation | None]
    weights: list[float]
    table: FilePath | None
    delta_low: float
    delta_high: float

    def __call__(self, log_mu_NS, log_pi_NS):
        return 0
"""


def test_a_users_module_may_have_its_annotations_as_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixtures_of_mine.py").write_text(USERS_MODULE)
    (tmp_path / "table.csv").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    @dataclass(frozen=True)
    class Root:
        divergence: Divergence

    tv = {"_target_": "dppo_cli.algorithm.divergence.TotalVariation", "delta_low": 0.1, "delta_high": 0.2}
    mixture = {
        "_target_": "mixtures_of_mine.Mixture",
        "parts": [tv],
        "by_name": {"a": {"_target_": "dppo_cli.algorithm.approx.TopK", "k": 3}, "b": None},
        "weights": [1],
        "table": "table.csv",
        "delta_low": 0,
        "delta_high": 0,
    }
    made: Any = build(Root, OmegaConf.create({"divergence": mixture})).divergence
    assert type(made).__name__ == "Mixture"
    assert made.parts == [TotalVariation(0.1, 0.2)]
    assert made.by_name == {"a": TopK(3), "b": None}
    assert (made.weights, made.table) == ([1.0], str(tmp_path / "table.csv"))
