"""What is imported to stay."""

import gc
import sys
from pathlib import Path

import pytest

from dppo_cli.processes import lasting

MODULE = "import gc\nCOLLECTED = gc.isenabled()\nHELD = []\n"


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an item each time that all there is is set apart."""
    monkeypatch.syspath_prepend(str(tmp_path))
    times: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: times.append(1))
    for name, text in {"to_stay": MODULE, "to_fail": f"{MODULE}raise ValueError"}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setitem(sys.modules, name, sys)  # so that it is taken out again
        monkeypatch.delitem(sys.modules, name)
    return times


def test_no_garbage_is_collected_meanwhile(frozen: list[int]) -> None:
    module = lasting.load("to_stay")
    assert module is sys.modules["to_stay"] and not module.COLLECTED
    assert len(frozen) == 1 and gc.isenabled()


def test_a_second_time_nothing_more_is_kept(frozen: list[int]) -> None:
    """A sweep's earlier jobs are garbage by then."""
    assert lasting.load("to_stay") is lasting.load("to_stay")
    assert len(frozen) == 1


def test_an_import_that_fails_and_a_process_that_does_not_collect(frozen: list[int]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        lasting.load("to_fail")
    assert gc.isenabled()
    gc.disable()
    try:
        lasting.load("to_stay")
        assert not gc.isenabled()
    finally:
        gc.enable()
