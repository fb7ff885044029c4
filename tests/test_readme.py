"""Every command in the README and in docs/ composes, and every `make` target it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from dppo_cli.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of every command in a ```sh block, without prompts and comments."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append(words)
    return found


DOCS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = commands(README)


def test_the_first_screen_names_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert ["make", "demo"] in commands(first_screen) and ["make", "test"] in commands(first_screen)
    assert len(COMMANDS) > 6


@pytest.mark.parametrize("words", COMMANDS + commands(DOCS), ids=" ".join)
def test_every_command_composes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, *rest = words
    if program in ("torchrun", "accelerate"):
        program, rest = "dppo", rest[rest.index("dppo_cli") + 1 :]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in rest:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"the Makefile has no target {target}"
    elif program == "dppo" and (not rest or rest[0].startswith("-")):
        assert main(rest) == 0
    else:
        assert program == "dppo"
        # What a sweep runs first, instead of all of it.
        single = [re.sub(r"=([\w./]+),.*", r"=\1", word) for word in rest if word not in ("-m", "--multirun")]
        single = [word for word in single if "=tag(" not in word]  # the range of a search
        assert main([*single, "--cfg", "job"]) == 0, capsys.readouterr().err
        assert not re.search(r": \?\?\?$", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:|#)([^)#]+)", README))
def test_every_file_that_is_linked_exists(link: str) -> None:
    assert (ROOT / link).exists()
