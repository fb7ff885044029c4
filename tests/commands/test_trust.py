"""Runs of somebody else: the code that their config names runs only if the user says so. One's own need no word."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent

import pytest
from helpers import TINY_RUN, composed, read_json
from omegaconf import OmegaConf

from dppo_cli.cli.main import main
from dppo_cli.config.saved import PLAIN, SIGNATURE, is_ours, sign

MODULE = """\
from dataclasses import dataclass
from pathlib import Path

from dppo_cli.algorithm.divergence import TotalVariation
from dppo_cli.data.arithmetic import Arithmetic
from dppo_cli.reward.exact import Exact
from dppo_cli.rollout.local import LocalRollout

Path(__file__).with_name("marker").touch()


@dataclass(frozen=True)
class Divergence(TotalVariation):
    pass


@dataclass(frozen=True)
class Data(Arithmetic):
    pass


@dataclass(frozen=True)
class Reward(Exact):
    pass


@dataclass(frozen=True)
class Rollout(LocalRollout):
    pass
"""
FUNCTION = """\
from pathlib import Path

Path(__file__).with_name("marker").touch()


def half(prompts, completions, **columns):
    return [0.5 for _ in completions]
"""
"""Each leaves a file beside itself when it is imported."""

FROM_A_FILE, ANSWERED = (
    indent(OmegaConf.to_yaml(composed("train", f"{group}=function", f"{group}.path=HERE/half.py:half")[group]), "  ")
    for group in ("reward", "environment")
)
PATH = "reward.path={here}/half.py:half"
CODE = {
    "divergence._target_=theirs.Divergence": ("dppo_cli.algorithm.divergence.TotalVariation", "theirs.Divergence"),
    "data._target_=theirs.Data": ("dppo_cli.data.arithmetic.Arithmetic", "theirs.Data"),
    "reward._target_=theirs.Reward": ("dppo_cli.reward.exact.Exact", "theirs.Reward"),
    "rollout._target_=theirs.Rollout": ("dppo_cli.rollout.local.LocalRollout", "theirs.Rollout"),
    "environment.path={here}/half.py:half": (
        f"  _target_: {PLAIN[2]}\n",
        ANSWERED.replace("HERE", "{here}"),
    ),
    PATH: ("  _target_: dppo_cli.reward.exact.Exact\n  pattern: null\n", FROM_A_FILE.replace("HERE", "{here}")),
}
"""What a run's config names, and the change that makes it do so."""

Imported = Callable[[], bool]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that names no code. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [*TINY_RUN, "data.train_problems=32", f"model.path={tiny_models['llama3']}", "steps=1", "run_dir=run"]
        assert main(["train", *words]) == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, work: Path) -> Path:
    """A copy of it, as it would come from another machine: nobody's. Beside it theirs.py and half.py."""
    shutil.copytree(made, "run")
    (work / "theirs.py").write_text(MODULE)
    (work / "half.py").write_text(FUNCTION)
    write(Path("run"), unsigned(Path("run")))
    return Path("run")


@pytest.fixture
def imported(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imported]:
    """Whether a file of the working folder was imported since this was asked last."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def asked() -> bool:
        sys.modules.pop("theirs", None)
        found = (work / "marker").exists()
        (work / "marker").unlink(missing_ok=True)
        return found

    yield asked
    sys.modules.pop("theirs", None)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], imported: Imported) -> Refused:
    """The one line of a command that is refused; no code was imported, and nothing written but a sweep's records."""

    def refusing(*words: str) -> str:
        before = {path for path in Path().rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(list(words)) == 2
        error = capsys.readouterr().err
        assert not imported()
        assert error.count("\n") == 1 and error.startswith("dppo: ")
        after = {path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {path.name for path in after - before} <= ({"job.json", "multirun.yaml"} if "-m" in words else set())
        return error

    return refusing


def unsigned(run: Path) -> str:
    return (run / "config.yaml").read_text().rpartition(SIGNATURE)[0] or (run / "config.yaml").read_text()


def write(run: Path, text: str) -> None:
    (run / "config.yaml").write_text(text)


def edit(run: Path, old: str, new: str) -> None:
    text = unsigned(run)
    assert old in text
    write(run, text.replace(old, new.format(here=Path.cwd())))


# Somebody else's


@pytest.mark.parametrize("named", CODE)
def test_code_that_somebody_elses_run_names_runs_only_if_the_user_says_so(
    named: str, run: Path, imported: Imported, refused: Refused
) -> None:
    """A module in the working folder, or a file."""
    edit(run, *CODE[named])
    said = f"names code that would run: {named.format(here=Path.cwd())}. Read it, then add trust=true"
    for words in (["eval", "run=run"], ["export", "run=run"], ["train", "resume=run", "steps=2"]):
        assert said in refused(*words)
    assert main(["eval", "run=run", "out=result", "trust=true"]) == 0
    assert imported()


@pytest.mark.parametrize(
    "words", ["eval run=run seed=1,2", "export run=run format=adapter,merged", "train resume=run steps=2,3"]
)
def test_jobs_of_a_sweep_are_refused_like_single_runs(words: str, run: Path, refused: Refused) -> None:
    edit(run, *CODE[PATH])
    command, *rest = words.split()
    assert "2 of 2 jobs failed; job 0: run/config.yaml was written by somebody else" in refused(command, "-m", *rest)


def test_every_command_takes_the_word(model: Path, run: Path, imported: Imported, refused: Refused) -> None:
    words = [*TINY_RUN, "data.train_problems=32", f"model.path={model}", "steps=1", "run_dir=theirs"]
    assert main(["train", *words, "divergence._target_=theirs.Divergence"]) == 0
    assert imported()
    theirs = Path("theirs")
    write(theirs, unsigned(theirs))
    for more in (["export", "run=theirs"], ["eval", "-m", "run=theirs", "seed=1"]):
        assert main([*more, "trust=true"]) == 0
        assert imported()
    refused("train", "resume=theirs", "steps=2")
    assert main(["train", "resume=theirs", "steps=2", "trust=true"]) == 0
    assert imported()
    # What goes on is the user's own.
    assert is_ours((theirs / "config.yaml").read_text())
    assert main(["export", "run=theirs", "out=again"]) == 0
    assert read_json(theirs / "summary.json")["steps"] == 2


def test_a_module_that_lies_in_the_run(
    run: Path, imported: Imported, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the working folder, too, of a user who looks around in there."""
    edit(run, *CODE["divergence._target_=theirs.Divergence"])
    shutil.move("theirs.py", run / "theirs.py")
    refused("eval", "run=run")
    monkeypatch.chdir(run)
    refused("eval", "run=.")
    assert not Path("marker").exists()
    assert main(["eval", "run=.", "trust=true"]) == 0
    assert Path("marker").exists()


@pytest.mark.parametrize(
    "words", ["reward=exact", "reward.path=rewards.py:late", "reward=function reward.path=rewards.py:late"]
)
def test_a_reward_that_the_user_names_instead_needs_no_trust(words: str, run: Path, imported: Imported) -> None:
    edit(run, *CODE[PATH])
    assert main(["eval", "run=run", "out=result", *words.split()]) == 0
    assert not imported()
    assert (read_json(Path("result/summary.json"))["accuracy"]) == 0.0


@pytest.mark.parametrize("word", ["reward.timeout=9", "+reward.timeout=9", "seed=2", "hardware=cpu", "rollout=local"])
def test_a_word_about_something_else_is_no_trust(word: str, run: Path, refused: Refused) -> None:
    edit(run, *CODE[PATH])
    assert "reward.path=" in refused("eval", "run=run", word)


@pytest.mark.parametrize("word", ["~reward", "reward={}", "+reward={}", "++reward={timeout:5}"])
def test_a_word_that_leaves_the_reward_is_no_trust(word: str, run: Path, refused: Refused) -> None:
    edit(run, *CODE[PATH])
    refused("eval", "run=run", word)


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_word_for_a_section_that_the_command_lacks_is_no_trust(command: str, run: Path, refused: Refused) -> None:
    edit(run, *CODE["divergence._target_=theirs.Divergence"])
    refused(command, "run=run", "+divergence=tv")


def test_code_in_what_may_hold_anything(run: Path, refused: Refused) -> None:
    edit(run, "target_modules: all-linear", "target_modules: [{{_target_: theirs.Divergence}}]")
    assert "adapter.target_modules[0]._target_=theirs.Divergence" in refused("eval", "run=run")


def test_a_name_that_only_begins_like_ours(run: Path, refused: Refused) -> None:
    edit(run, "_target_: dppo_cli.algorithm.divergence.TotalVariation", "_target_: dppo_cli.embedded.pretrain.X")
    assert "divergence._target_=dppo_cli.embedded.pretrain.X" in refused("eval", "run=run")


def test_whose_run_it_is(
    run: Path, imported: Imported, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(run, *CODE[PATH])
    body = unsigned(run)
    own = sign(body)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
        another = sign(body)
        write(run, own)
        refused("eval", "run=run")
    for text in (another, own.replace("seed: 1", "seed: 2"), f"{own}# note\n", own[: own.rindex(":")]):
        write(run, text)
        refused("eval", "run=run")
    write(run, own)
    assert main(["eval", "run=run"]) == 0
    assert imported()


def test_a_run_that_names_no_code_needs_no_trust(run: Path) -> None:
    """Edited, signed by nobody."""
    edit(run, "eval_problems: 4", "eval_problems: 3")
    assert main(["eval", "run=run", "out=result"]) == 0
    assert read_json(Path("result/summary.json"))["problems"] == 3
    assert main(["export", "run=run"]) == 0
    edit(run, "eval_problems: 3", "eval_problems: 4")
    assert main(["train", "resume=run", "steps=2"]) == 0
    assert read_json(run / "summary.json")["steps"] == 2


# One's own


@pytest.mark.parametrize("named", CODE)
def test_ones_own_runs_need_no_word(named: str, run: Path, imported: Imported) -> None:
    edit(run, *CODE[named])
    write(run, sign(unsigned(run)))
    assert main(["eval", "run=run", "out=result"]) == 0
    assert imported()
    shutil.copytree(run, "elsewhere/copy")
    shutil.rmtree(run)
    assert main(["export", "run=elsewhere/copy"]) == 0
    assert imported() or "path" in named


def test_ones_own_runs_are_resumed(model: Path, run: Path, imported: Imported) -> None:
    words = [*TINY_RUN, "data.train_problems=32", f"model.path={model}", "steps=1", "run_dir=own"]
    words += ["divergence._target_=theirs.Divergence", "reward=function", "reward.path=half.py:half"]
    assert main(["train", *words]) == 0
    assert imported()
    assert main(["train", "resume=own", "steps=2"]) == 0
    assert imported()
    assert read_json(Path("own/summary.json"))["steps"] == 2
