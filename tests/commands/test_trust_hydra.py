"""Values of the environment and the hub: what a run folder holds of them, and what a folder of somebody else gets."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from disturbed import WEIGHTS
from helpers import TINY_RUN, read_json, read_lines

from dppo_cli.cli.main import main
from dppo_cli.config.saved import SIGNATURE, sign

MARK = "blue7sky"
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DPPO_MARK", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, MARK)


@pytest.fixture
def words(model: Path, work: Path) -> list[str]:
    return [*TINY_RUN, "data.train_problems=32", f"model.path={model}", "steps=1"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line of a command that is refused."""

    def refusing(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("dppo: ")
        return error

    return refusing


def where_it_is(text: str = MARK) -> list[str]:
    """Every file and folder below the working folder that has a text in it, or in its name."""
    files = [path for path in sorted(Path().rglob("*")) if path.is_file()]
    assert files
    return [str(path) for path in files if text.encode() in path.read_bytes() or text in str(path)]


def config(run: Path, old: str = "", new: str = "", signed: bool = False) -> None:
    """Change a run's config, as somebody else, or as the user would by training so."""
    text = (run / "config.yaml").read_text().rpartition(SIGNATURE)[0]
    assert old in text
    text = text.replace(old, new)
    (run / "config.yaml").write_text(sign(text) if signed else text)


# In one's own runs


ASKS = ("prompt.template=chat", "prompt.system='${oc.env:DPPO_MARK}!'")


def test_a_value_of_the_environment_is_used_and_is_in_no_file(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", *words, *ASKS, "run_dir=run", "checkpoint.every=1"]) == 0
    assert main(["export", "run=run"]) == 0
    assert main(["train", "resume=run", "steps=2"]) == 0
    assert where_it_is() == []
    assert "system: ${oc.env:DPPO_MARK}!" in Path("run/config.yaml").read_text()
    names = {path.name for path in Path("run").rglob("*")}
    assert {"README.md", "resumes.json", "manifest.json", "summary.json", "metrics.jsonl"} <= names

    seen: list[object] = []

    def stop(self: object, examples: object, prompting: object) -> None:
        seen.append(prompting.system)
        raise KeyboardInterrupt

    monkeypatch.setattr("dppo_cli.policy.encoder.Encoder.encode", stop)
    assert main(["train", "resume=run", "steps=3"]) == 130
    monkeypatch.setenv("DPPO_MARK", "red8")
    for command in (["eval", "run=run"], ["export", "run=run", "out=again"]):
        assert main(command) == 130
    assert seen == [f"{MARK}!", "red8!", "red8!"]


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_nor_in_a_file_of_a_sweep(quote: str, words: list[str]) -> None:
    asks = ["prompt.template=chat", f"prompt.system={quote}${{oc.env:DPPO_MARK}}{quote}"]
    assert main(["train", "-m", *words, *asks, "run_dir=sweep", "seed=1,2"]) == 0
    assert where_it_is() == []
    assert "system: ${oc.env:DPPO_MARK}" in Path("sweep/0/config.yaml").read_text()
    assert read_json(Path("sweep/1/job.json"))["status"] == 0


def test_nor_in_a_file_of_an_evaluation(words: list[str]) -> None:
    assert main(["train", *words, *ASKS, "run_dir=run"]) == 0
    assert main(["eval", "run=run", "out=result"]) == 0
    assert main(["eval", "-m", "run=run", "seed=1"]) == 0
    assert where_it_is() == []


def test_nor_after_a_resume_that_asks_for_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_NUMBER", "7654321")
    assert main(["train", *words, "run_dir=run"]) == 0
    assert main(["train", "resume=run", "steps=2", "checkpoint.every=${oc.env:DPPO_NUMBER}"]) == 0
    assert where_it_is("7654321") == []


def test_nor_in_the_name_of_a_file(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / MARK).mkdir()
    (tmp_path / MARK / "sums.jsonl").write_text(
        "".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(8))
    )
    data = ["data=file", "data.path=${oc.env:DPPO_MARK}/sums.jsonl", "data.eval_problems=4"]
    rest = [word for word in words if not word.startswith("data.")]
    assert main(["train", *rest, *data, "run_dir=run"]) == 0
    assert "path: ${oc.env:DPPO_MARK}/sums.jsonl" in Path("run/config.yaml").read_text()


def test_nor_by_the_paths_in_a_summary(words: list[str], tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / MARK / "model").parent.mkdir()
    shutil.copytree(tiny_models["llama3"], tmp_path / MARK / "model")
    where = "${oc.env:DPPO_MARK}"
    plain = [f"model.path={where}/model", "data=arithmetic", "data.eval_problems=4", "sampling.max_new_tokens=8"]
    assert main(["eval", *plain, f"out={where}/evaluation"]) == 0
    assert main(["train", *words, f"run_dir={where}/run"]) == 0
    assert main(["eval", f"run={where}/run"]) == 0
    written = [*Path(MARK, "evaluation").rglob("*"), *Path(MARK, "run").rglob("*")]
    assert [path for path in written if path.is_file() and MARK.encode() in path.read_bytes()] == []
    found = read_json(tmp_path / MARK / "evaluation/summary.json")
    assert (found["model"], found["out"]) == (f"{where}/model", f"{where}/evaluation")
    found = read_json(tmp_path / MARK / "run/summary.json")
    assert (found["run_dir"], found["adapter"]) == (f"{where}/run", f"{where}/run/adapter")


def test_text_that_looks_like_an_interpolation_stays_text(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def stop(self: object, examples: object, prompting: object) -> None:
        seen.append(prompting.system)
        raise KeyboardInterrupt

    monkeypatch.setattr("dppo_cli.policy.encoder.Encoder.encode", stop)
    assert main(["train", *words, "prompt.template=chat", r"prompt.system='\${oc.env:DPPO_MARK}'"]) == 130
    assert seen == ["${oc.env:DPPO_MARK}"]


# Secrets


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "HF_TOKEN,none", '"HF_TOKEN"'])
@pytest.mark.parametrize("key", ["run_dir", "prompt.system"])
def test_a_secret_on_the_command_line(key: str, name: str, words: list[str], refused: Refused) -> None:
    """In single runs and in a sweep; before anything is written."""
    for options in ([], ["-m", "seed=1,2"]):
        said = refused("train", *options, *words, f"{key}=${{oc.env:{name}}}")
        assert "would put a secret into files; leave it out" in said and MARK not in said
    assert {path.name for path in Path().iterdir()} == {"rewards.py"}


@pytest.mark.parametrize("options", [[], ["-m", "seed=1,2"]], ids=["single", "sweep"])
def test_a_secret_in_a_file_of_the_users_own(options: list[str], words: list[str], refused: Refused) -> None:
    Path("own/extra").mkdir(parents=True)
    Path("own/extra/x.yaml").write_text("# @package _global_\nprompt:\n  system: ${oc.env:HF_TOKEN}\n")
    said = refused("train", "--config-dir", "own", *options, *words, "+extra=x", "prompt.template=chat", "run_dir=run")
    assert "${oc.env:HF_TOKEN} would put a secret into files" in said
    assert where_it_is() == [] and not list(Path().rglob("config.yaml"))


def test_the_folder_of_a_run_in_a_file_of_the_users_own(words: list[str], refused: Refused) -> None:
    Path("own/extra").mkdir(parents=True)
    Path("own/extra/x.yaml").write_text("# @package _global_\nrun_dir: ${oc.env:HF_TOKEN}\n")
    assert "would put a secret into files" in refused("train", "--config-dir", "own", *words, "+extra=x")
    assert where_it_is() == []


# In runs of somebody else


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a system message. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [*TINY_RUN, "data.train_problems=32", f"model.path={tiny_models['llama3']}", "steps=1"]
        assert main(["train", *words, "prompt.template=chat", "prompt.system=hello", "run_dir=run"]) == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, work: Path) -> Path:
    return Path(shutil.copytree(made, "run"))


@pytest.mark.parametrize("text", ["x ${oc.env:HOME,y}", "${model.path}", "'${seed}'"])
def test_an_interpolation_of_somebody_elses_is_refused(text: str, run: Path, refused: Refused) -> None:
    config(run, "system: hello", f"system: {text}")
    assert "has an interpolation, " in refused("eval", "run=run")


def test_every_command_refuses_it(run: Path, refused: Refused) -> None:
    config(run, "system: hello", "system: ${oc.env:DPPO_MARK}")
    for words in (["eval", "run=run"], ["export", "run=run"], ["train", "resume=run", "steps=2"]):
        assert "run/config.yaml was not written by you, and has an interpolation" in refused(*words)
    assert "2 of 2 jobs failed; job 0: run/config.yaml was not" in refused("eval", "-m", "run=run", "seed=1,2")
    assert where_it_is() == []
    assert not Path("run/eval").exists()


def test_escaped_text_of_somebody_elses_asks_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def stop(self: object, examples: object, prompting: object) -> None:
        seen.append(prompting.system)
        raise KeyboardInterrupt

    config(run, "system: hello", r"system: \${oc.env:DPPO_MARK}")
    monkeypatch.setattr("dppo_cli.policy.encoder.Encoder.encode", stop)
    for words in (["eval", "run=run"], ["export", "run=run"], ["train", "resume=run", "steps=2"]):
        main(words)
    assert MARK not in str(seen)


def test_with_trust_it_works(run: Path) -> None:
    config(run, "system: hello", "system: ${oc.env:DPPO_MARK}")
    assert main(["eval", "run=run", "trust=true", "out=result"]) == 0
    assert len(read_lines(Path("result/samples.jsonl"))) == 4


# What a folder lacks is not looked for on the hub


@pytest.mark.parametrize("words", ["eval", "export", "export format=merged"])
def test_a_run_without_weights_asks_nobody(
    words: str, run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the name of a user on the hub, with an adapter folder, as PEFT would take for a name there."""
    run.rename("someuser")
    Path(f"someuser/{WEIGHTS}").unlink()
    asked: list[object] = []

    def connect(*where: object, **options: object) -> None:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", connect)
    assert f"there is no {WEIGHTS} in it" in refused(*words.split(), "run=someuser")
    shutil.rmtree("someuser/adapter")
    assert "run=someuser has lost its adapter" in refused(*words.split(), "run=someuser")
    assert not asked
