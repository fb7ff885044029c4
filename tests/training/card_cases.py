"""What tests of model cards share: a run's config, and how a card is read."""

from typing import Any

from helpers import composed
from markdown_it import MarkdownIt
from markdown_it.token import Token
from omegaconf import OmegaConf


def config(*overrides: str) -> dict[str, Any]:
    """A run's config.yaml."""
    return OmegaConf.to_container(composed("train", *overrides), resolve=True)  # type: ignore[return-value]


def tokens(text: str) -> list[Token]:
    """The Markdown after the front matter, as GitHub and the hub read it."""
    return MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])


def snippet(text: str) -> str:
    """The Python that loads the model."""
    return "".join(t.content for t in tokens(text) if t.type == "fence")
