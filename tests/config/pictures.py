"""A schema for the tests of `build`: a picture of shapes, some of them made of others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from omegaconf import OmegaConf

from dppo_cli.config.build import build
from dppo_cli.errors import ConfigError


class Shape(Protocol):
    @property
    def name(self) -> str: ...
    def area(self) -> float: ...


@dataclass(frozen=True)
class Square:
    name: str
    side: float

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class Collage:
    """Shapes in shapes, in a list and by name."""

    name: str
    parts: list[Shape]
    named: dict[str, Shape]

    def area(self) -> float:
        return sum(part.area() for part in [*self.parts, *self.named.values()])


class Circle:
    """Has what a shape needs, but is not a dataclass."""

    name = "circle"

    def area(self) -> float:
        return 3.0


@dataclass(frozen=True)
class Pen:
    width: int
    colour: str | None


@dataclass(frozen=True)
class FineTip(Pen):
    sharp: bool


@dataclass(frozen=True)
class Picture:
    shape: Shape
    frame: Shape | None
    pen: Pen
    title: str
    sizes: list[float]
    labels: dict[str, str]
    extra: Any


def target(cls: type | Callable[..., Any], **fields: Any) -> dict[str, Any]:
    return {"_target_": f"{cls.__module__}.{cls.__name__}", **fields}


def square(side: float = 2.0) -> dict[str, Any]:
    return target(Square, name="square", side=side)


def collage(*parts: Any, **named: Any) -> dict[str, Any]:
    return target(Collage, name="collage", parts=list(parts), named=named)


def picture(**changes: Any) -> Picture:
    """What `build` makes of a picture with these fields."""
    whole = {
        "shape": square(),
        "frame": None,
        "pen": {"width": 1, "colour": None},
        "title": "",
        "sizes": [],
        "labels": {},
        "extra": None,
    }
    return build(Picture, OmegaConf.create({**whole, **changes}))


def refused(**changes: Any) -> str:
    """The message when a picture with these fields is refused."""
    with pytest.raises(ConfigError) as error:
        picture(**changes)
    return str(error.value)
