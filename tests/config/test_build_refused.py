"""From a composed node to dataclasses: what is refused, and which key the message names."""

from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf
from pictures import Circle, Collage, Pen, Picture, Shape, Square, collage, picture, refused, square, target

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.errors import ConfigError

HERE = Picture.__module__


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"title": square()}, "title"),
        ({"title": [square()]}, "title"),
        ({"pen": {"width": square(), "colour": None}}, "pen.width"),
        ({"pen": {"width": 1, "colour": square()}}, "pen.colour"),
        ({"sizes": square()}, "sizes"),
        ({"sizes": [1.0, square()]}, "sizes[1]"),
        ({"sizes": [1.0, [2.0]]}, "sizes[1]=[2.0] must be one value"),
        ({"sizes": [{"a": 1.0}]}, "sizes[0]={'a': 1.0} must be one value"),
        ({"labels": {"a": square()}}, "labels.a"),
        ({"labels": {"_target_": "os.system"}}, "labels"),
        ({"shape": collage(target(Square, name=square(), side=1))}, "shape.parts[0].name"),
    ],
)
def test_a_target_in_a_field_of_plain_values(changes: dict[str, Any], key: str) -> None:
    """A target that nothing builds would look like a value."""
    assert refused(**changes).startswith(key)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"shape": target(Pen, width=1, colour=None)},
            f"shape._target_={HERE}.Pen cannot be used as Shape: it lacks name, area",
        ),
        ({"shape": collage(square(), target(Pen))}, f"shape.parts[1]._target_={HERE}.Pen cannot be used as Shape"),
        ({"shape": collage(a=target(Pen))}, f"shape.named.a._target_={HERE}.Pen cannot be used as Shape"),
        ({"frame": target(Pen)}, f"frame._target_={HERE}.Pen cannot be used as Shape"),
        ({"shape": target(Circle)}, f"shape._target_={HERE}.Circle is not a dataclass"),
        ({"shape": target(Shape)}, f"shape._target_={HERE}.Shape is not a dataclass"),
        ({"shape": target(picture)}, f"shape._target_={HERE}.picture is not a dataclass"),
        ({"extra": {"_target_": "os.system"}}, "extra._target_=os.system is not a dataclass"),
        ({"shape": {"_target_": f"{HERE}.Sqare"}}, f"shape._target_={HERE}.Sqare cannot be imported"),
        ({"shape": {"_target_": "no_such_module.Square"}}, "shape._target_=no_such_module.Square cannot be imported"),
        ({"shape": {"_target_": "Square"}}, "shape._target_=Square cannot be imported"),
        ({"shape": {"_target_": ".shapes.Square"}}, "shape._target_=.shapes.Square cannot be imported"),
        ({"shape": {"_target_": None}}, "shape._target_=None cannot be imported"),
        ({"shape": {"name": "square", "side": 1}}, "shape cannot hold keys"),
        ({"shape": [square()]}, "shape cannot be a list"),
        ({"shape": "square"}, "shape=square is an invalid value"),
        ({"shape": None}, "shape=None is an invalid value"),
        ({"shape": collage("square")}, "shape.parts[0]=square is an invalid value"),
        ({"shape": target(Collage, name="", parts=square(), named={})}, "shape.parts"),
        ({"shape": target(Collage, name="", parts=[], named=square())}, "shape.named"),
        ({"shape": target(Square, name="", side=1, _partial_=True)}, "there is no key shape._partial_"),
    ],
)
def test_objects_that_a_field_cannot_hold(changes: dict[str, Any], says: str) -> None:
    assert refused(**changes).startswith(says)


@pytest.mark.parametrize(
    ("field", "wrong", "lacks"),
    [
        (
            "divergence",
            "dppo_cli.reward.exact.Exact",
            "cannot be used as Divergence: it lacks delta_low, delta_high, __call__",
        ),
        (
            "divergence",
            "dppo_cli.algorithm.approx.TopK",
            "cannot be used as Divergence: it lacks delta_low, delta_high, __call__",
        ),
        ("reward", "dppo_cli.algorithm.divergence.KL", "cannot be used as RewardSource: it lacks load"),
        (
            "objective",
            "dppo_cli.algorithm.aggregation.TokenMean",
            "cannot be used as Objective: it lacks needs_all_tokens, masks",
        ),
    ],
)
def test_the_options_of_a_run_are_told_apart(field: str, wrong: str, lacks: str) -> None:
    """By what their Protocol asks of a class, before any of its fields is looked at."""
    root = make_dataclass("Root", [(field, get_type_hints(TrainConfig)[field])], frozen=True)
    with pytest.raises(ConfigError) as error:
        build(root, OmegaConf.create({field: {"_target_": wrong}}))
    assert str(error.value).startswith(f"{field}._target_={wrong} {lacks}")


def test_a_module_that_fails_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_with_a_typo.py").write_text("def (:\n")
    (tmp_path / "module_that_divides.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in (("module_with_a_typo", "invalid syntax"), ("module_that_divides", "division by zero")):
        line = refused(shape={"_target_": f"{name}.Square"})
        assert line.startswith(f"shape._target_={name}.Square cannot be imported") and reason in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pen": {"width": "wide", "colour": None}}, "pen.width: Value 'wide'"),
        ({"pen": {"width": 1.5, "colour": None}}, "pen.width: Value '1.5'"),
        ({"pen": {"width": None, "colour": None}}, "pen.width: Incompatible value 'None'"),
        ({"pen": {"width": {"a": 1}, "colour": None}}, "pen.width: "),
        ({"title": ["a"]}, "title: "),
        ({"sizes": 0.9}, "sizes=0.9 must be a list, sizes=[0.9] for one value"),
        ({"shape": collage(square(), square("x"))}, "shape.parts[1].side: Value 'x'"),
        ({"shape": collage(a=square("x"))}, "shape.named.a.side: Value 'x'"),
        ({"pne": 1}, "there is no key pne; did you mean 'pen'? Choices: extra, frame"),
        ({"pen": {"width": 1, "color": "red"}}, "there is no key pen.color; did you mean 'colour'?"),
        ({"shape": collage({**square(), "sied": 1})}, "there is no key shape.parts[0].sied; did you mean 'side'?"),
        ({"shape": collage(a={**square(), "sied": 1})}, "there is no key shape.named.a.sied"),
        ({"_target_": f"{HERE}.Picture"}, "there is no key _target_"),
        ({"title": "???"}, "title is not set; add title=..."),
        ({"shape": "???"}, "shape is not set; add shape=..."),
        ({"pen": {"width": "???", "colour": None}}, "pen.width is not set; add pen.width=..."),
        ({"pen": {"width": 1}}, "pen.colour is not set"),
        ({"shape": collage(square(), square("???"))}, "shape.parts[1].side is not set"),
        ({"shape": collage(a=target(Square, name="square"))}, "shape.named.a.side is not set"),
    ],
)
def test_messages_name_the_dotted_key(changes: dict[str, Any], says: str) -> None:
    assert refused(**changes).startswith(says)
