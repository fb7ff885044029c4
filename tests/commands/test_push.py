"""`dppo export push_to_hub=OWNER/NAME`: huggingface_hub's own client against a small hub on this machine.

Large files go by Git LFS, which the client uses where hf_xet is switched off: Xet's storage cannot be played in a test.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf_files
import hub
import pytest
from helpers import train, write_rewards
from huggingface_hub import constants

from dppo_cli.cli.main import main

# The client's own, in the way it hands bytes to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        assert train(gguf_files.save(folder / "base"), "steps=1", "run_dir=run") == 0
    return folder / "run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub.Hub]:
    with hub.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield found


@pytest.fixture
def refused(trained: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`dppo export ...` that is refused in one line without the token."""

    def run(*words: str) -> str:
        assert main(["export", f"run={trained}", "push_to_hub=me/mine", "out=mine", *words]) == 2
        error = capsys.readouterr().err
        line = error.strip().splitlines()[-1]
        assert line.startswith("dppo: ") and "Traceback" not in error and hub.TOKEN not in error
        return line

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["adapter", "merged", "gguf"])
def test_what_arrives_is_what_was_exported(
    form: str, server: hub.Hub, trained: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"converter={gguf_files.__file__}"] if form == "gguf" else []
    words = ["export", f"run={trained}", f"format={form}", "out=mine", "push_to_hub=me/mine", *own]
    assert main(words) == 0
    assert server.files == contents(work / "mine")
    weights = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors", "gguf": "model-f32.gguf"}
    assert {weights[form], "README.md"} <= server.files.keys()
    assert server.made == [{"name": "mine", "organization": "me", "visibility": "private"}]
    assert server.tokens == {f"Bearer {hub.TOKEN}"}
    output = capsys.readouterr()
    assert f"pushed to {server.url}/me/mine" in output.out
    assert hub.TOKEN not in output.out + output.err
    assert not any(hub.TOKEN.encode() in content for content in contents(work).values())


def test_a_public_repository(server: hub.Hub, trained: Path, work: Path) -> None:
    assert main(["export", f"run={trained}", "out=mine", "push_to_hub=me/mine", "push_private=false"]) == 0
    assert server.made[0]["visibility"] == "public"


def test_a_repository_that_is_there_already(server: hub.Hub, trained: Path, work: Path) -> None:
    server.refuse["/api/repos/create"] = 409
    assert main(["export", f"run={trained}", "out=mine", "push_to_hub=me/mine"]) == 0
    assert server.files == contents(work / "mine")


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/api/repos/create", 401, "the hub does not accept the token (401)"),
        ("/api/repos/create", 403, "the token may not write there (403); it needs write access"),
        ("/preupload/main", 403, "the token may not write there (403)"),
        ("/commit/main", 409, "the repository is being changed by something else (409); try again"),
        ("/objects/batch", 418, "the hub answered with status 418"),
        ("/storage", 403, "the token may not write there (403)"),
    ],
)
def test_a_hub_that_refuses(
    path: str, status: int, reason: str, server: hub.Hub, refused: Callable[..., str], work: Path
) -> None:
    """After the export, which stays."""
    server.refuse[path] = status
    line = refused()
    assert line.startswith(f"dppo: push_to_hub=me/mine: {reason}")
    assert line.endswith("; the export is complete in mine: `hf upload me/mine mine`")
    assert server.files == {} and "adapter_model.safetensors" in contents(work / "mine")


def test_a_hub_that_refuses_hf_xet(
    server: hub.Hub, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.refuse["/xet-write-token/main"] = 403
    assert refused().startswith("dppo: push_to_hub=me/mine: the token may not write there (403)")


# Before the work


def test_a_token_that_is_not_accepted(server: hub.Hub, refused: Callable[..., str], work: Path) -> None:
    server.refuse["/api/whoami-v2"] = 401
    assert "the hub does not accept the token (401); log in again with `hf auth login`; nothing was exp" in refused()
    assert not (work / "mine").exists()


def test_without_a_token(
    server: hub.Hub, refused: Callable[..., str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "push_to_hub=me/mine needs a token with write access: `hf auth login`, or HF_TOKEN" in refused()
    assert not (work / "mine").exists() and server.asked == []


def test_without_a_network(
    server: hub.Hub, refused: Callable[..., str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub (http://127.0.0.1:9) does not answer (ConnectError); nothing was exported" in refused()
    assert not (work / "mine").exists()


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/", "-/mine", "me/mine model"])
def test_a_name_without_an_owner(name: str, server: hub.Hub, refused: Callable[..., str], work: Path) -> None:
    assert "is not OWNER/NAME; OWNER is you or an organisation" in refused(f"push_to_hub='{name}'")
    assert not (work / "mine").exists() and server.asked == []
