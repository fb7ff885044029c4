"""The verifiers of reasoning-gym, locked up."""

import json
import sys

import make
import pytest
from locked_up import needs_namespaces

from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.reward.procedural import ReasoningGym
from dppo_cli.types import Prompt, Score

reasoning_gym = pytest.importorskip("reasoning_gym")


LOCKED_UP = pytest.param(True, marks=needs_namespaces)


def option(**changes) -> ReasoningGym:
    """With the defaults of conf/reward/reasoning_gym.yaml."""
    fields = {
        "task_column": "task",
        "entry_column": "entry",
        "pattern": None,
        "sandbox": True,
        "timeout": 5.0,
        "default": 0.0,
        "workers": 2,
        "memory_gib": 4.0,
    }
    return ReasoningGym(**{**fields, **changes})


def problem(task: str) -> tuple[Prompt, str]:
    entry = reasoning_gym.create_dataset(task, seed=3, size=1)[0]
    return make.prompt(answer=str(entry["answer"]), task=task, entry=json.dumps(entry, default=str)), entry["answer"]


@pytest.mark.parametrize("locked_up", [LOCKED_UP, False])
def test_verifiers_score_answers(locked_up):
    tasks = ["spell_backward", "countdown", "basic_arithmetic", "n_queens", "simple_equations"]
    problems = [problem(task) for task in tasks]
    completions = [[make.completion(text=f" {right}\n"), make.completion(text="no")] for _, right in problems]
    found = option(sandbox=locked_up).load(make.fail)([prompt for prompt, _ in problems], completions)
    assert [right.value for right, _ in found] == [1.0] * len(tasks)
    assert all(0 <= wrong.value < 0.5 for _, wrong in found)
    assert found[0][0] == Score(1.0, answer=problems[0][1])


def test_the_answer_is_what_the_pattern_takes():
    prompt, right = problem("spell_backward")
    scorer = option(pattern="(?s)<answer>(.*?)</answer>", sandbox=False).load(make.fail)
    texts = [f"so <answer>\n{right}</answer>", right]
    ((first, second),) = scorer([prompt], [[make.completion(text=text) for text in texts]])
    assert first == Score(1.0, answer=right)
    assert second == Score(0.0, note="no answer was found")


def test_a_row_of_another_data_set_is_not_judged():
    rows = [make.prompt(0), make.prompt(1, task="no_such_task", entry="{}")]
    found = option(sandbox=False).load(make.fail)(rows, [[make.completion()]] * 2)
    assert found == [
        [Score(None, note="the row is not of data=reasoning_gym")],
        [Score(None, note="reasoning-gym has no task 'no_such_task'")],
    ]


@needs_namespaces
def test_an_answer_that_is_run_as_python_reaches_nothing(tmp_path):
    """The verifier of n_queens evaluates the answer."""
    prompt, right = problem("n_queens")
    (tmp_path / "secret").write_text("x")
    answers = [
        f"[open({str(tmp_path / 'written')!r}, 'w')]",
        f"[open({str(tmp_path / 'secret')!r})]",
        "[__import__('os')._exit(0)]",
        "[__import__('os').kill(__import__('os').getppid(), 9)]",
        "[__import__('time').sleep(600)]",
        "[bytearray(10**11)]",
        str(right),
    ]
    completions = [[make.completion(text=text) for text in answers]]
    (found,) = option(timeout=2.0).load(make.fail)([prompt], completions)
    assert [score.value for score in found] == [0.0] * 6 + [1.0]
    assert found[2].note == "its verifier was ended by the answer"
    assert found[4].note == "it took longer than 2 seconds"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_without_the_package_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    words = r"^reward=reasoning_gym needs the package reasoning-gym: pip install 'dppo\[tasks\]'$"
    with pytest.raises(RewardError, match=words):
        option().load(make.fail)


@pytest.mark.parametrize(("field", "value"), [("pattern", "("), ("timeout", 0.0), ("workers", 0)])
def test_options_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"reward\.{field}="):
        option(**{field: value})
