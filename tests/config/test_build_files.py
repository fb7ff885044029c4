"""Options that name files: absolute where the file exists, in the object and in the config that a run folder keeps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from omegaconf import DictConfig, OmegaConf

from dppo_cli.config.build import FilePath, build


class Source(Protocol):
    def load(self) -> str: ...


@dataclass(frozen=True)
class File:
    path: FilePath
    second: FilePath | None
    name: str

    def load(self) -> str:
        return self.path


@dataclass(frozen=True)
class Mixture:
    parts: list[Source]
    named: dict[str, Source]

    def load(self) -> str:
        return ""


@dataclass(frozen=True)
class Root:
    source: Source
    files: list[FilePath]


def file(path: str | None, second: str | None = None, name: str = "") -> dict[str, Any]:
    return {"_target_": f"{__name__}.File", "path": path, "second": second, "name": name}


def mixture(*parts: Any, **named: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.Mixture", "parts": list(parts), "named": named}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rewards.py and below/data.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below/data.jsonl").touch()
    return tmp_path


def built(source: Any, files: tuple[str, ...] = ()) -> tuple[Any, DictConfig]:
    """The source of a config, and the node after it was built."""
    # As Hydra composes it: no key may be added.
    node = OmegaConf.create({"source": source, "files": list(files)})
    OmegaConf.set_struct(node, True)
    return build(Root, node), node


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("rewards.py", "rewards.py"),
        ("below/../rewards.py", "rewards.py"),
        ("./below/data.jsonl", "below/data.jsonl"),
        ("below", "below"),
        ("rewards.py:score", "rewards.py:score"),
    ],
)
def test_what_exists_becomes_absolute_in_the_object_and_in_the_node(here: Path, given: str, becomes: str) -> None:
    root, node = built(file(given, second=given))
    assert root.source.path == root.source.second == f"{here}/{becomes}"
    assert node.source.path == node.source.second == f"{here}/{becomes}"


@pytest.mark.parametrize(
    "given", ["nowhere.py", "nowhere.py:score", "meta-llama/Llama-3.1-8B", "embedded:arithmetic_1m", "module.of.mine:f"]
)
def test_what_does_not_exist_stays(here: Path, given: str) -> None:
    root, node = built(file(given))
    assert root.source.path == node.source.path == given


def test_null_and_plain_text_stay(here: Path) -> None:
    root, node = built(file("rewards.py", second=None, name="rewards.py"))
    assert root.source.second is None and node.source.second is None
    assert root.source.name == node.source.name == "rewards.py"


def test_parts_in_a_list_and_by_name(here: Path) -> None:
    inner = mixture(file("below/data.jsonl"), file("nowhere"))
    root, node = built(mixture(file("rewards.py:score"), inner, first=file("below", second="rewards.py")))
    first, second = root.source.parts
    assert first.path == node.source.parts[0].path == f"{here}/rewards.py:score"
    assert second.parts[0].path == node.source.parts[1].parts[0].path == f"{here}/below/data.jsonl"
    assert second.parts[1].path == node.source.parts[1].parts[1].path == "nowhere"
    named = root.source.named["first"]
    assert named.path == node.source.named.first.path == f"{here}/below"
    assert named.second == node.source.named.first.second == f"{here}/rewards.py"


def test_a_list_of_files(here: Path) -> None:
    root, node = built(file("nowhere"), files=("rewards.py", "nowhere", "rewards.py:score"))
    assert root.files == [f"{here}/rewards.py", "nowhere", f"{here}/rewards.py:score"]
    assert list(node.files) == root.files


def test_the_node_builds_the_same_object_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder is read from anywhere."""
    root, node = built(mixture(file("rewards.py:score"), first=file("below/data.jsonl")))
    text = OmegaConf.to_yaml(node)
    monkeypatch.chdir(here / "below")
    assert build(Root, OmegaConf.create(text)) == root
