"""The choices of conf/data that name a set: their prompts and answers, on rows with the columns that the sets have."""

import json
from pathlib import Path

import fake_hub
import pytest
from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.data.task import Task

REAL = Path(__file__).parents[2].parent / "shared" / "data"
BOXED = "\n\nReason step by step, and put your final answer within \\boxed{}."


def real(name: str) -> fake_hub.Rows:
    path = REAL / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name}, a data set that is not part of the repository")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What `dppo train WORDS` has as its data, where the hub has one set."""

    def loaded(name: str, config: str, splits: dict[str, fake_hub.Rows], *words: str) -> tuple[Task, list[str]]:
        fake_hub.add_set(tmp_path / "hub", name, {config: splits})
        told: list[str] = []
        with fake_hub.serving(tmp_path / "hub") as address, monkeypatch.context() as patch:
            fake_hub.use(patch, address, tmp_path / "cache")
            config_ = build(TrainConfig, OmegaConf.create(OmegaConf.to_container(composed("train", *words))))
            return config_.data.load(told.append), told

    return loaded


def test_gsm8k(load) -> None:
    splits = {"train": real("gsm8k_train"), "test": real("gsm8k_test")}
    task, told = load("openai/gsm8k", "main", splits, "data=gsm8k", "data.eval_problems=null")
    assert (len(task.train), len(task.heldout), told) == (7473, 1319, [])
    first = task.train[0]
    assert first.prompt == f"{splits['train'][0]['question']}{BOXED}"
    assert (first.answer, first.columns) == ("72", {**splits["train"][0], "answer": "72"})
    assert [e.answer for e in task.heldout[:3]] == ["18", "3", "70000"]
    assert {e.prompt for e in task.train}.isdisjoint(e.prompt for e in task.heldout)


def test_math(load) -> None:
    problems = real("math500")
    task, _ = load(
        "nlile/hendrycks-MATH-benchmark", "default", {"train": problems[:300], "test": problems[300:]}, "data=math"
    )
    assert (len(task.train), len(task.heldout)) == (300, 200)
    assert task.train[0].prompt == f"{problems[0]['problem']}{BOXED}"
    assert task.train[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"


def test_sanity(load) -> None:
    """All 1,460, as conversations, and measured on what is trained on."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{row['problem']} Put it in \\boxed{{}}."}],
            "reward_model": {"ground_truth": row["answer"], "style": "rule"},
        }
        for row in real("math_sanity_1k5")
    ]
    task, told = load("sail/Sanity-Test-R1D-1.5B", "default", {"train": rows, "test": rows[:3]}, "data=sanity")
    assert (len(task.train), len(task.heldout)) == (1460, 200)
    assert task.train[0].messages == rows[0]["prompt"]
    assert [e.answer for e in task.train[:3]] == ["0", "3", "88572"]
    assert "accuracy is that of training" in told[0]


def test_dapo_math(load) -> None:
    rows = [{"prompt": f"Find {n}.", "solution": str(n), "reward_model": {"ground_truth": str(n)}} for n in range(300)]
    task, _ = load("open-r1/DAPO-Math-17k-Processed", "en", {"train": rows}, "data=dapo_math")
    assert (len(task.train), len(task.heldout)) == (100, 200)
    assert (task.train[7].prompt, task.train[7].answer) == (f"Find 7.{BOXED}", "7")


def test_countdown(load) -> None:
    rows = [{"target": 98 + n, "nums": [44, 19, 35]} for n in range(300)]
    task, _ = load("Jiayi-Pan/Countdown-Tasks-3to4", "default", {"train": rows}, "data=countdown")
    assert (len(task.train), len(task.heldout)) == (100, 200)
    assert task.train[0].prompt == (
        "Using the numbers [44, 19, 35], make an equation that equals 98. You may use +, -, *, / and parentheses, and "
        "each number exactly once. Reason first, then give the equation between <answer> and </answer>, for example "
        "<answer>(1 + 2) / 3</answer>."
    )
    assert (task.train[0].answer, task.train[0].columns) == ("98", {"target": "98", "nums": [44, 19, 35]})


def test_ultrafeedback(load) -> None:
    pair = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]
    rows = [
        {"prompt": f"p{n}", "prompt_id": "x", "chosen": pair, "rejected": pair, "score_chosen": 8.5} for n in range(4)
    ]
    splits = {"train_prefs": rows[:2], "test_prefs": rows[2:]}
    task, _ = load("HuggingFaceH4/ultrafeedback_binarized", "default", splits, "data=ultrafeedback")
    assert [(e.prompt, e.answer, e.messages) for e in task.train] == [("p0", "", ()), ("p1", "", ())]
    assert task.heldout[0].columns == rows[2]
