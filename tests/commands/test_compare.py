"""`dppo compare`: two runs on the same problems."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
from helpers import TINY_RUN, read_json, read_lines, write_rewards
from omegaconf import OmegaConf

from dppo_cli.cli.main import main
from dppo_cli.commands import compare
from dppo_cli.errors import DataError
from dppo_cli.training.evaluation import EvalResult
from dppo_cli.types import Group, Score

WORDS = ("reward=function", "reward.path=rewards.py:even", "data.train_problems=32", "data.eval_problems=30")
EVEN = "eval.success_reward=0.25"


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `weak` and `strong`, which differ in how much they learn. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    write_rewards(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [*TINY_RUN, *WORDS, f"model.path={tiny_models['llama3']}", EVEN]
        assert main(["train", *words, "run_dir=weak", "steps=1", "optim.lr=0.0001"]) == 0
        more = [
            "steps=8",
            "optim.lr=0.02",
            "batch.prompts_per_step=4",
            "checkpoint.every=4",
            "rollout.concurrent_sequences=5",
        ]
        assert main(["train", *words, *more, "run_dir=strong"]) == 0
    return folder


@pytest.fixture
def runs(made: Path, work: Path) -> Path:
    for name in ("weak", "strong"):
        shutil.copytree(made / name, work / name)
    return work


def compared(*words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    shutil.rmtree("out", ignore_errors=True)
    assert main(["compare", *words, "out=out"]) == 0
    return read_json(Path("out/summary.json")), read_lines(Path("out/changed.jsonl"))


def rate(of: str, *words: str) -> list[bool]:
    """Which problems `dppo eval` finds right."""
    shutil.rmtree("alone", ignore_errors=True)
    assert main(["eval", of, "out=alone", *words]) == 0
    return [row["correct"] for row in read_lines(Path("alone/samples.jsonl"))]


def test_two_runs_are_what_two_evaluations_are(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, rows = compared("run=weak", "other=strong", "shown=2")
    output = capsys.readouterr().out
    weak, strong = rate("run=weak"), rate("run=strong")
    assert sum(weak) != sum(strong)
    assert (summary["run"], summary["other"], summary["out"]) == ("weak", "strong", "out")
    assert summary["first"]["accuracy"] == pytest.approx(sum(weak) / 30)
    assert summary["second"]["accuracy"] == pytest.approx(sum(strong) / 30)
    difference = summary["difference"]
    assert difference["mean"] == pytest.approx((sum(weak) - sum(strong)) / 30) and difference["problems"] == 30
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]
    only_weak = [i for i in range(30) if weak[i] and not strong[i]]
    only_strong = [i for i in range(30) if strong[i] and not weak[i]]
    assert [row["problem"] for row in rows if row["solved_by"] == "first"] == only_weak
    assert [row["problem"] for row in rows if row["solved_by"] == "second"] == only_strong
    assert (summary["only_first"], summary["only_second"]) == (len(only_weak), len(only_strong)) and only_strong
    assert (
        f"{sum(weak) / 30:.1%}" in output and f"{100 * difference['mean']:+.1f}" in output and "weak - strong" in output
    )
    assert output.count("  prompt: ") == 2


def test_a_changed_problem_has_both_answers(runs: Path) -> None:
    _, rows = compared("run=weak", "other=strong")
    samples = {}
    for name in ("weak", "strong"):
        rate(f"run={name}")
        samples[name] = read_lines(Path("alone/samples.jsonl"))
    for row in rows:
        weak, strong = (samples[name][row["problem"]] for name in ("weak", "strong"))
        assert (row["prompt"], row["answer"]) == (weak["prompt"], weak["answer"])
        assert row["first"] == {"right": float(weak["correct"]), "completions": [weak["completion"]]}
        assert row["second"] == {"right": float(strong["correct"]), "completions": [strong["completion"]]}


def test_a_run_and_its_base(runs: Path, model: Path) -> None:
    summary, _ = compared("run=weak", "other=base")
    words = ["data=arithmetic", "data.eval_problems=30", "reward=function", "reward.path=rewards.py:even"]
    plain = rate(f"model.path={model}", *words, "hardware=cpu", "sampling.max_new_tokens=4", "success_reward=0.25")
    assert summary["second"]["accuracy"] == pytest.approx(sum(plain) / 30)
    assert summary["first"]["accuracy"] == pytest.approx(sum(rate("run=weak")) / 30)


def test_a_run_and_itself(runs: Path) -> None:
    summary, rows = compared("run=strong", "other=strong/checkpoints/step-8", "samples_per_prompt=4")
    assert summary["first"] == summary["second"] and rows == []
    assert list(summary["first"]["pass_at"]) == ["1", "2", "4"]
    assert summary["difference"] == {"mean": 0.0, "interval": None, "problems": 30}


def test_what_is_shared_and_what_is_each_runs_own(runs: Path) -> None:
    compared("run=weak", "other=strong", "data.eval_problems=3", "sampling.temperature=0", "hardware.head_chunk=8")
    config = OmegaConf.load("out/config.yaml")
    for name in ("data", "reward", "sampling", "success_reward", "seed"):
        assert config.first[name] == config.second[name], name
    assert config.first.rollout.concurrent_sequences != config.second.rollout.concurrent_sequences == 5
    assert [side.hardware.head_chunk for side in (config.first, config.second)] == [8, 8]
    assert (config.first.data.eval_problems, config.first.sampling.temperature) == (3, 0)
    summary, _ = compared("run=weak", "other=strong", "data=arithmetic", "data.eval_problems=2", "reward=exact")
    assert summary["first"]["problems"] == 2 and summary["first"]["accuracy"] == 0.0


def test_json_is_all_of_stdout(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "run=weak", "other=base", "data.eval_problems=4", "json=true"]) == 0
    summary = json.loads(capsys.readouterr().out)
    (out,) = Path("comparisons").iterdir()
    assert summary == read_json(out / "summary.json") and summary["out"] == str(out)


def test_no_value_of_the_environment_is_written(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / "hidden").mkdir()
    (runs / "weak").rename(runs / "hidden/weak")
    monkeypatch.setenv("MY_RUNS", "hidden")
    assert main(["compare", "run=${oc.env:MY_RUNS}/weak", "other=base", "data.eval_problems=2", "out=out"]) == 0
    assert read_json(runs / "out/summary.json")["run"] == "${oc.env:MY_RUNS}/weak"
    assert "hidden" not in (runs / "out/config.yaml").read_text()


def test_a_reward_that_judges_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "none.py").write_text("def f(prompts, completions, **columns):\n    return [None] * len(prompts)\n")
    words = ["data.eval_problems=2", "reward=function", "reward.path=none.py:f"]
    summary, rows = compared("run=weak", "other=base", *words)
    assert (summary["first"]["accuracy"], summary["difference"], rows) == (None, None, [])
    assert capsys.readouterr().out.count("not measured") == 3


# Problems and samples, without a model


def result(*problems: tuple[int, list[float | None]], answer: str = "a") -> EvalResult:
    groups = []
    for index, values in problems:
        texts = [make.completion() for _ in values]
        groups.append(Group(make.prompt(index=index, answer=answer), texts, [Score(v) for v in values]))
    return EvalResult(groups, 1.0)


def test_of_several_samples_at_least_half_are_right() -> None:
    first = result((0, [1.0, 0.0]), (1, [0.0, 0.0]), (2, [1.0, None]), (3, [None, None]))
    second = result((0, [0.0, 0.0]), (1, [1.0, 0.0]), (2, [1.0, 1.0]), (3, [1.0, 1.0]))
    rows = compare.changed(first, second)
    assert [(row["problem"], row["solved_by"]) for row in rows] == [(0, "first"), (1, "second")]
    assert [(row["first"]["right"], row["second"]["right"]) for row in rows] == [(0.5, 0.0), (0.0, 0.5)]


def test_problems_that_only_one_can_take_are_left_out_of_both() -> None:
    warnings: list[str] = []
    first, second = compare._same_problems(
        result((0, [1.0]), (1, [0.0])), result((1, [1.0]), (2, [1.0]), (3, [1.0])), warnings.append
    )
    assert [g.prompt.index for g in first.groups] == [g.prompt.index for g in second.groups] == [1]
    assert (first.accuracy, second.accuracy) == (0.0, 1.0)
    assert warnings == ["3 problems are too long for one of the two and are left out"]


def test_problems_that_changed_in_between_are_refused() -> None:
    with pytest.raises(DataError, match="problem 0 was not the same for both runs"):
        compare._same_problems(result((0, [1.0])), result((0, [1.0]), answer="b"), lambda _: None)


# Mistakes


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refusing(*words: str) -> str:
        capsys.readouterr()
        assert main(["compare", *words]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == ""
        return captured.err

    return refusing


def test_two_runs_are_named(work: Path, refused: Callable[..., str]) -> None:
    for words in ((), ("run=one",), ("other=two",)):
        assert "name two runs" in refused(*words)
    assert "write run=RUN other=base" in refused("run=base", "other=base")
    assert "run=nowhere points nowhere" in refused("run=nowhere", "other=base")


def test_the_run_that_is_wrong_is_named_by_its_key(runs: Path, refused: Callable[..., str]) -> None:
    assert refused("run=weak", "other=nowhere").startswith("dppo: other=nowhere points nowhere; there are: ")
    assert refused("run=nowhere", "other=weak").startswith("dppo: run=nowhere points nowhere; there are: ")
    (runs / "file").mkdir()
    assert refused("run=weak", "other=file") == "dppo: other=file is not a run: it has no config.yaml\n"
    said = refused("run=weak", "other=base", "samples_per_prompt=many")
    assert said == "dppo: samples_per_prompt=many is not a whole number\n"


def test_the_second_is_looked_at_before_the_first_is_sampled(
    runs: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dppo_cli.commands.evaluate.measure", lambda *_: pytest.fail("sampled"))
    (runs / "strong/adapter/adapter_model.safetensors").unlink()
    assert "other=strong has lost its adapter" in refused("run=weak", "other=strong")
    (runs / "taken").mkdir()
    (runs / "taken/notes.txt").write_text("mine")
    assert "out=taken is not empty" in refused("run=weak", "other=base", "out=taken")
    assert "shown=-1" in refused("run=weak", "other=base", "shown=-1")
    assert "there is no key data.eval_problem" in refused("run=weak", "other=base", "data.eval_problem=2")


def test_both_runs_may_be_named_at_once(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "runs=[weak, base]", "data.eval_problems=4", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["second"]["problems"] == 4
    assert main(["compare", "runs=[weak]", "data.eval_problems=4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
