"""`dppo eval` on runs and plain models."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from helpers import read_json, read_lines, train

from dppo_cli.cli.main import main
from dppo_cli.training.evaluation import pass_at_k


def test_a_run_is_evaluated_as_it_was_at_its_end(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seed, problems, samples and length are the same, so the accuracy is, too, from the saved adapter."""
    words = ["steps=4", "optim.lr=0.02", "reward.path=rewards.py:even", "data.eval_problems=20", "run_dir=run"]
    assert train(model, *words, "batch.prompts_per_step=4", "eval.success_reward=0.25") == 0
    after = read_json(work / "run/summary.json")["eval_after"]
    assert 0.05 < after < 0.95
    assert main(["eval", "run=run", "success_reward=0.25", "out=result"]) == 0
    summary = read_json(work / "result/summary.json")
    assert summary["accuracy"] == after
    assert (summary["problems"], summary["samples_per_prompt"], summary["run"]) == (20, 1, "run")
    assert summary["out"] == "result"
    assert summary["sampling"]["max_new_tokens"] == 4
    assert summary["pass_at"] == {"1": after}
    assert f"{after:.1%}" in capsys.readouterr().out


def test_a_run_is_evaluated_from_any_folder(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that the command named by relative paths are found again."""
    (work / "model").symlink_to(model)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]
    (work / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert train(Path("model"), "data=file", "data.path=sums.jsonl", "data.eval_path=sums.jsonl", "run_dir=run") == 0
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert main(["eval", f"run={work / 'run'}", "out=result"]) == 0
    assert read_json(work / "elsewhere/result/summary.json")["problems"] == 4


def test_the_samples_file_holds_every_sample(model: Path, work: Path) -> None:
    assert train(model, "steps=1", "run_dir=run") == 0
    words = ["samples_per_prompt=4", "pass_k=[1,2,4]", "success_reward=0.5", "out=result"]
    assert main(["eval", "run=run", *words]) == 0
    rows, summary = read_lines(work / "result/samples.jsonl"), read_json(work / "result/summary.json")
    assert [row["problem"] for row in rows] == [i for i in range(4) for _ in range(4)]
    assert set(rows[0]) == {
        "problem",
        "prompt",
        "answer",
        "completion",
        "messages",
        "reward",
        "correct",
        "finished",
        "tokens",
    }
    for row in rows:
        first, sign, second = row["prompt"].rstrip("=").partition("+" if "+" in row["prompt"] else "-")
        right = int(first) + int(second) if sign == "+" else int(first) - int(second)
        assert row["answer"] == str(right)
        text = row["completion"]
        assert row["reward"] == pytest.approx(sum(ord(c) % 16 for c in text) / (15 * max(1, len(text))))
        assert row["correct"] == (row["reward"] >= 0.5)
        assert 1 <= row["tokens"] <= 4 and (row["finished"] or row["tokens"] == 4)
    counts = [sum(row["correct"] for row in rows[i : i + 4]) for i in range(0, 16, 4)]
    assert 0 < sum(counts) < 16
    assert summary["accuracy"] == sum(counts) / 16
    assert summary["pass_at"] == {str(k): pytest.approx(mean(pass_at_k(4, c, k) for c in counts)) for k in (1, 2, 4)}
    assert summary["finished"] == sum(row["finished"] for row in rows) / 16


def test_a_sample_that_is_not_judged_has_no_reward_and_counts_for_nothing(model: Path, work: Path) -> None:
    source = "def f(prompts, completions, **columns):\n    return [None, 1.0] * (len(prompts) // 2)\n"
    (work / "half.py").write_text(source)
    assert plain(model, "reward=function", "reward.path=half.py:f", "samples_per_prompt=2", "out=result") == 0
    rows = read_lines(work / "result/samples.jsonl")
    assert [(row["reward"], row["correct"]) for row in rows] == [(None, False), (1.0, True)] * 6
    assert read_json(work / "result/summary.json")["accuracy"] == 1.0


def plain(model: Path, *overrides: str) -> int:
    words = [f"model.path={model}", "data=arithmetic", "data.eval_problems=6", "hardware=cpu"]
    words += ["sampling.max_new_tokens=8", *overrides]
    return main(["eval", *words])


def completions(folder: Path) -> list[str]:
    return [row["completion"] for row in read_lines(folder / "samples.jsonl")]


def test_a_plain_model(model: Path, work: Path) -> None:
    assert plain(model) == 0
    (out,) = (work / "evals").iterdir()
    summary = read_json(out / "summary.json")
    assert (summary["model"], summary["run"], summary["accuracy"]) == (str(model), None, 0.0)
    # The data option says how long answers are.
    assert summary["sampling"]["max_new_tokens"] == 8
    assert {p.name for p in out.iterdir()} == {"config.yaml", "samples.jsonl", "summary.json"}


def test_an_untrained_adapter_answers_like_the_plain_model(model: Path, work: Path) -> None:
    (work / "same.py").write_text("def f(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    assert train(model, "reward.path=same.py:f", "steps=1", "data.eval_problems=6", "run_dir=run") == 0
    assert main(["eval", "run=run", "out=trained"]) == 0
    assert plain(model, "sampling.max_new_tokens=4", "out=plain") == 0
    assert completions(work / "trained") == completions(work / "plain")


def test_truncated_sampling_is_allowed_and_is_greedy_where_it_leaves_one_token(model: Path, work: Path) -> None:
    assert plain(model, "sampling.temperature=0", "samples_per_prompt=2", "out=greedy") == 0
    greedy = completions(work / "greedy")
    assert greedy[0::2] == greedy[1::2]
    for name, value in (("top_p", "1.0e-6"), ("top_k", "1"), ("min_p", "0.9999")):
        assert plain(model, f"sampling.{name}={value}", "samples_per_prompt=2", f"out={name}") == 0
        assert completions(work / name) == greedy
    assert plain(model, "samples_per_prompt=2", "out=free") == 0
    assert completions(work / "free") != greedy


def test_seeds_of_an_evaluation(model: Path, work: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert plain(model, f"seed={seed}", f"out={name}") == 0
    assert completions(work / "one") == completions(work / "same") != completions(work / "other")


def test_the_prompt_is_the_runs_unless_said_otherwise(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(self: object, examples: object, prompting: Any) -> None:
        seen.append((prompting.template, prompting.system))
        raise KeyboardInterrupt

    assert train(model, "prompt.template=chat", "prompt.system=Add.", "steps=1", "run_dir=run") == 0
    monkeypatch.setattr("dppo_cli.policy.policy.Policy.encode", stop)
    for words in ([], ["prompt.template=plain"], ["prompt.system=Sum."], ["prompt.template=chat"]):
        assert main(["eval", "run=run", *words]) == 130
    assert plain(model) == 130
    assert seen == [("chat", "Add."), ("plain", None), ("chat", "Sum."), ("chat", None), ("plain", None)]


def test_other_problems_and_rewards_than_the_runs(model: Path, work: Path) -> None:
    (work / "new.jsonl").write_text('{"q": "2+2=", "a": "4"}\n{"q": "5+0=", "a": "5"}\n')
    assert train(model, "steps=1", "run_dir=run") == 0
    data = ["data=file", "data.path=unused.jsonl", "data.eval_path=new.jsonl", "data.eval_problems=null"]
    data += ["data.prompt_column=q", "data.answer_column=a"]
    (work / "unused.jsonl").write_text('{"q": "1+1=", "a": "2"}\n')
    assert main(["eval", "run=run", *data, "reward=exact", "out=result"]) == 0
    assert [(r["prompt"], r["answer"], r["reward"]) for r in read_lines(work / "result/samples.jsonl")] == [
        ("2+2=", "4", 0.0),
        ("5+0=", "5", 0.0),
    ]


def test_a_run_on_a_quantised_base(model: Path, work: Path) -> None:
    assert train(model, "adapter=qlora", "steps=2", "optim.lr=0.02", "data.eval_problems=8", "run_dir=run") == 0
    after = read_json(work / "run/summary.json")["eval_after"]
    assert main(["eval", "run=run", "out=result"]) == 0
    assert read_json(work / "result/summary.json")["accuracy"] == after


# Mistakes


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main(["eval", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return run


def test_what_to_evaluate_is_named_once(refused: Callable[..., str], work: Path) -> None:
    assert "name what to evaluate" in refused()
    assert "one of them" in refused("run=run", "model.path=m")
    assert "data=arithmetic" in refused("model.path=m")


def test_pass_k_needs_as_many_samples(refused: Callable[..., str], work: Path) -> None:
    plain = ("model.path=m", "data=arithmetic")
    assert "pass_k=8" in refused(*plain, "pass_k=[1,8]", "samples_per_prompt=4")
    assert "pass_k=0" in refused(*plain, "pass_k=[0]")


def test_a_run_that_is_not_there(refused: Callable[..., str], work: Path) -> None:
    assert "run=runs/last points nowhere; train one with `dppo train`" in refused("run=runs/last")
    (work / "runs/monday").mkdir(parents=True)
    assert "run=runs/last points nowhere; there are: runs/monday" in refused("run=runs/last")
    assert "run=runs/monday is not a run: it has no config.yaml" in refused("run=runs/monday")


def test_a_target_that_exists(model: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "taken").mkdir()
    (work / "taken/notes.txt").write_text("mine")
    assert "out=taken is not empty" in refused(f"model.path={model}", "data=arithmetic", "out=taken")
    assert [p.name for p in (work / "taken").iterdir()] == ["notes.txt"]


def test_right_and_temperature_mean_what_they_meant_in_the_run(model: Path, work: Path) -> None:
    """The run's own evaluations were greedy, and a quarter of even digits counted as right."""
    words = ["reward.path=rewards.py:even", "eval.temperature=0", "eval.success_reward=0.25", "optim.lr=0.02"]
    assert train(model, *words, "steps=4", "data.eval_problems=20", "run_dir=run") == 0
    after = read_json(work / "run/summary.json")["eval_after"]
    assert after > 0
    assert main(["eval", "run=run", "out=same"]) == 0
    same = read_json(work / "same/summary.json")
    assert (same["accuracy"], same["sampling"]["temperature"]) == (after, 0.0)
    assert main(["eval", "run=run", "success_reward=-1", "sampling.temperature=0.5", "out=other"]) == 0
    other = read_json(work / "other/summary.json")
    assert (other["accuracy"], other["sampling"]["temperature"]) == (1.0, 0.5)
