"""What the environment says of processes that a launcher has started."""

import pytest

from dppo_cli.cli.launcher import check_launcher, launched, speaker
from dppo_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "rank", "expected"),
    [
        (None, None, (1, "")),
        (None, "3", (1, "")),  # of a pod that has a number, and no others beside it
        ("1", "0", (1, "")),
        ("4", "0", (4, "")),
        ("4", None, (4, "")),
        ("4", "3", (4, "process 4 of 4: ")),
        ("4", "x", (4, "")),
        ("x", "1", (1, "")),
    ],
)
def test_who_speaks(monkeypatch: pytest.MonkeyPatch, size: str | None, rank: str | None, expected: object) -> None:
    for name, value in (("WORLD_SIZE", size), ("RANK", rank)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert (launched(), speaker()) == expected


def test_what_they_can_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launcher("eval", sweeps=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launcher("train", sweeps=False)
    with pytest.raises(
        ConfigError,
        match=r"dppo plan does not work under a launcher, which has started 2 processes; start it by itself$",
    ):
        check_launcher("plan", sweeps=False)
    with pytest.raises(ConfigError, match=r"a sweep \(-m\) does not work .* hardware.processes=... for its jobs"):
        check_launcher("train", sweeps=True)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as raised:
        check_launcher("plan", sweeps=False)
    assert raised.value.code == 2, "one of them says it"
