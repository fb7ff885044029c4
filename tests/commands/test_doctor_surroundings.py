"""What `dppo doctor` says of folders and the hub, where they are odd or broken."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from checkups import Change, only

from dppo_cli.commands.checkup import surroundings
from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row


def test_the_working_folder(work: Path, monkeypatch: Change) -> None:
    usage = SimpleNamespace(free=3 * 2**30)
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda path: usage)
    row = only(surroundings.disk())
    assert (row.status, row.text, row.facts) == (OK, f"3.0 GiB free in {work}", {"free_gib": 3.0})
    usage.free = 2**29
    assert only(surroundings.disk()).status == WARNING
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: False)
    assert only(surroundings.disk()).status == PROBLEM


def test_the_key_of_signatures(tmp_path: Path, monkeypatch: Change) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    row = only(surroundings.signatures())
    assert (row.status, row.text) == (OK, f"runs are signed with {tmp_path / 'config/dppo/key'}")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    row = only(surroundings.signatures())
    assert row.status == WARNING and row.text.startswith(f"no key can be kept in {tmp_path / 'file/dppo'}")


class Session:
    """A session whose questions do what they are told."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def head(self, url: str, timeout: float) -> None:
        self.act()


def hub(monkeypatch: Change, act: Callable[[], None], offline: bool = False) -> Row:
    monkeypatch.setattr("huggingface_hub.get_session", lambda: Session(act))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    return only(surroundings.reaches_hub(*surroundings.start_hub()))


def test_the_hub(monkeypatch: Change) -> None:
    def refuses() -> None:
        raise ConnectionError("no route\nto host")

    assert hub(monkeypatch, lambda: None).facts == {"reachable": True, "offline": False}
    row = hub(monkeypatch, refuses)
    assert (row.status, row.fix) == (WARNING, "export HF_HUB_OFFLINE=1")
    assert row.text.startswith("Hugging Face does not answer (no route): ")
    # Offline, it is not asked.
    row = hub(monkeypatch, refuses, offline=True)
    assert (row.status, row.facts) == (OK, {"reachable": False, "offline": True})
    monkeypatch.setattr(surroundings, "HUB_SECONDS", 0.2)
    row = hub(monkeypatch, lambda: time.sleep(2))
    assert row.status == WARNING and "no answer in 0.2 seconds" in row.text


def test_the_token_of_the_hub_is_not_shown(monkeypatch: Change) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert only(surroundings.token()) == Row("hub token", OK, "there is one", facts={"present": True})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert only(surroundings.token()).fix == "hf auth login"
