"""config.yaml: who signed it, and the key that signs."""

import multiprocessing
import secrets
from contextlib import suppress
from pathlib import Path
from threading import BrokenBarrierError

import pytest

from dppo_cli.config.saved import is_ours, sign


def test_who_signed_it(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sign("a: 1\n")
    body, last = text.splitlines()
    assert body == "a: 1" and last.startswith("# signature: ") and len(last.split(": ")[1]) == 64
    assert is_ours(text) and sign("a: 1\n") == text
    for changed in ("a: 1\n", text.replace("1", "2", 1), text + "b: 2\n", "b: 2\n" + text):
        assert not is_ours(changed)
    assert not is_ours(text[:-2] + ("0" if text[-2] != "0" else "1") + "\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    assert not is_ours(text)
    assert sign("a: 1\n") != text and not is_ours(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(keys))
    assert is_ours(text)


@pytest.mark.parametrize("named", ["relative", "./x", ""])
def test_a_relative_folder_is_ignored(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", named)
    assert is_ours(sign("a: 1\n"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home/.config/dppo/key").is_file()


def test_only_signing_makes_a_key(keys: Path) -> None:
    assert not is_ours(f"a: 1\n# signature: {'0' * 64}\n")
    assert not keys.exists()
    sign("a: 1\n")
    (key,) = keys.rglob("*key*")
    assert key == keys / "dppo/key"
    assert key.stat().st_size == 32 and key.stat().st_mode & 0o077 == 0


def test_where_no_key_can_be_kept(keys: Path) -> None:
    """Nothing is signed, and nothing fails."""
    keys.write_text("not a folder")
    assert sign("a: 1\n") == "a: 1\n"
    assert not is_ours("a: 1\n")


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_key_that_is_damaged_signs_nothing(keys: Path, content: bytes) -> None:
    text = sign("a: 1\n")
    (keys / "dppo/key").write_bytes(content)
    assert not is_ours(text)
    assert sign("a: 1\n") == "a: 1\n"


def test_a_file_system_without_links_leaves_nothing_behind(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", impossible)
    text = sign("a: 1\n")
    assert [path.name for path in keys.rglob("*") if path.is_file()] in ([], ["key"])
    assert text == "a: 1\n" or is_ours(text)


def test_processes_that_make_the_key_at_once(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come later take the key of the first."""
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.Queue()
    real = secrets.token_bytes

    def together(size: int) -> bytes:
        with suppress(BrokenBarrierError):
            barrier.wait(5)
        return real(size)

    monkeypatch.setattr(secrets, "token_bytes", together)
    processes = [context.Process(target=lambda: found.put(sign("a: 1\n"))) for _ in range(4)]
    for process in processes:
        process.start()
    signed = {found.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
    assert not barrier.broken
    assert len(signed) == 1 and is_ours(signed.pop())
    assert [path.name for path in keys.rglob("*") if path.is_file()] == ["key"]
