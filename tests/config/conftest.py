"""What tests of saved configs share."""

from pathlib import Path

import pytest


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config folder of a user who has no key yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "keys"))
    return tmp_path / "keys"
