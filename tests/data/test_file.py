"""Problems from files of JSON lines, and what the options do with their rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import composed
from omegaconf import OmegaConf
from sources import source

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.data.file import File
from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError, DataError
from dppo_cli.types import Example

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(5)]
REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The task in a file of the given lines; dicts are written as JSON."""
    monkeypatch.chdir(tmp_path)

    def write(lines: list[Any], **fields: Any) -> Task:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
        return source(**fields).load(print)

    return write


def test_the_last_lines_are_held_out(load):
    task = load(ROWS)
    assert [e.prompt for e in task.train] == ["0+1=", "1+1=", "2+1="]
    assert [e.prompt for e in task.heldout] == ["3+1=", "4+1="]
    assert task.train[0] == Example("0+1=", "1", {"prompt": "0+1=", "answer": "1"})


def test_held_out_problems_from_another_file(load, tmp_path):
    """What both have is held out, whether or not it is evaluated on now."""
    others = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in (9, 8, 4)]
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(r) for r in others))
    task = load(ROWS, eval_path="eval.jsonl", eval_problems=None)
    assert [e.prompt for e in task.train] == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert [e.prompt for e in task.heldout] == ["9+1=", "8+1=", "4+1="]
    limited = load(ROWS, eval_path="eval.jsonl", eval_problems=2)
    assert (limited.train, limited.heldout) == (task.train, task.heldout[:2])


def test_other_columns_reach_the_reward(load):
    """All of them, whatever their names; the answer's holds the answer that was found in it."""
    rows = [{"q": "a", "a": 1, "level": 3, "tags": ["x"], "answer": "other", "prompts": 0}, {"q": "b", "a": 2.5}]
    task = load(rows, prompt_column="q", answer_column="a", eval_problems=1)
    columns = {"q": "a", "a": "1", "level": 3, "tags": ["x"], "answer": "other", "prompts": 0}
    assert task.train[0] == Example("a", "1", columns)
    assert task.heldout[0] == Example("b", "2.5", {"q": "b", "a": "2.5"})


def test_text_is_taken_as_it_is(load):
    rows = [{"prompt": "  straße \u2028 日本\n", "answer": " ½ "}, *ROWS]
    assert load(rows).train[0] == Example("  straße \u2028 日本\n", " ½ ", rows[0])


def test_blank_lines_and_windows_line_ends_are_no_problems(load):
    lines = [json.dumps(ROWS[0]) + "\r", "", "   ", ROWS[1], ROWS[2], ""]
    assert [e.answer for e in load(lines).train] == ["1"]


def test_the_answer_within_its_column(load):
    rows = [{"prompt": f"p{i}", "answer": f"so 3 #### {i},000\nmore"} for i in range(3)]
    (first,) = load(rows, answer_pattern=r"####\s*(.+)").train
    assert (first.answer, first.columns) == ("0,000", {"prompt": "p0", "answer": "0,000"})
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: data\.answer_pattern='x\(y\)' does not match 'none'"):
        load([{"prompt": "p", "answer": "xy"}, {"prompt": "p", "answer": "none"}], answer_pattern="x(y)")
    with pytest.raises(DataError, match=r"line 1: data\.answer_pattern=.* does not match 'x'"):
        load([{"prompt": "p", "answer": "x"}], answer_pattern="x(y)?")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", ', r"train\.jsonl, line 2: no valid JSON \(.* at column 17\)"),
        ("[1, 2]", r"line 2: expected a JSON object, found list"),
        ('"text"', r"line 2: expected a JSON object, found str"),
        ('{"promt": "a", "answer": "b"}', r"no column 'prompt' \(data\.prompt_column\); did you mean 'promt'"),
        ('{"prompt": "a"}', r"line 2: there is no column 'answer' \(data\.answer_column\).*Choices: prompt"),
        ('{"prompt": ["a"], "answer": "b"}', r"line 2: message 1 is no object with the keys role and content"),
        ('{"prompt": {}, "answer": "b"}', r"line 2: column 'prompt' holds dict; expected text, a number or a"),
        ('{"prompt": "a", "answer": null}', r"line 2: column 'answer' holds NoneType; expected text or a number"),
        ('{"prompt": "a", "answer": true}', r"line 2: column 'answer' holds bool; expected text or a number"),
        ('{"prompt": " \\n", "answer": "b"}', r"line 2: the prompt is empty"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_a_problem_is_named(load, line, words):
    with pytest.raises(DataError, match=words) as error:
        load([ROWS[0], line, ROWS[1]])
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_exist(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"there is no file nowhere\.jsonl \(in {re.escape(str(tmp_path))}\)"):
        source(path="nowhere.jsonl").load(print)
    with pytest.raises(DataError, match=r"there is no file eval\.jsonl"):
        load(ROWS, eval_path="eval.jsonl")


def test_relative_paths_are_absolute_in_the_built_config(tmp_path, monkeypatch):
    """A run folder is read from anywhere, so its config.yaml, written from the node, must not depend on where."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    for name, rows in (("train.jsonl", ROWS[:2]), ("sets/eval.jsonl", ROWS[2:])):
        (tmp_path / name).write_text("\n".join(json.dumps(r) for r in rows))
    words = ("data=file", "data.path=train.jsonl", "data.eval_path=sets/eval.jsonl", "data.eval_problems=2")
    node = OmegaConf.create(OmegaConf.to_container(composed("train", *words)))
    data = build(TrainConfig, node).data
    assert isinstance(data, File)
    assert (data.path, data.eval_path) == (f"{tmp_path}/train.jsonl", f"{tmp_path}/sets/eval.jsonl")
    assert (node.data.path, node.data.eval_path) == (data.path, data.eval_path)
    monkeypatch.chdir(tmp_path / "sets")
    assert len(data.load(print).heldout) == 2


def test_a_file_that_holds_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}')
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 1: it is not UTF-8 text \(invalid start byte at byte 13\)"
    ):
        source().load(print)


def test_an_empty_file(load):
    with pytest.raises(DataError, match=r"train\.jsonl is empty; expected one problem a line"):
        load(["", "  "])


@pytest.mark.parametrize("eval_problems", [5, 6])
def test_something_must_be_left_to_train_on(load, eval_problems):
    with pytest.raises(DataError, match=rf"has 5 problems, and data\.eval_problems={eval_problems} .* lower it"):
        load(ROWS, eval_problems=eval_problems)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eval_problems": None}, r"set data\.eval_path, or data\.eval_problems"),
        ({"eval_problems": 0}, r"data\.eval_problems=0 breaks the rule"),
        ({"answer_pattern": "("}, r"data\.answer_pattern='\(' is not a regular expression"),
        ({"answer_pattern": "####"}, r"data\.answer_pattern='####' has no group"),
        ({"answer_pattern": "(x)", "answer_column": None}, r"has no data\.answer_column to search in"),
        ({"train_problems": 0}, r"data\.train_problems=0 breaks the rule"),
        ({"on_bad_row": "skip"}, r"data\.on_bad_row=skip is an invalid value.*refuse"),
        ({"prompt_column": None}, r"set data\.prompt_column, or data\.prompt_template"),
        ({"prompt_template": "{q}"}, r"data\.prompt_column=prompt would be unused; add data\.prompt_column=null"),
        ({"prompt_template": "q {}", "prompt_column": None}, r"names no column, so all prompts would be the same"),
        ({"path": None}, r"data\.path and data\.eval_path are null"),
    ],
)
def test_fields_that_cannot_work(fields, words):
    with pytest.raises(ConfigError, match=words):
        source(**fields)


def real(name: str) -> Path:
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"needs {name}, a data set that is not part of the repository")
    return path


def test_gsm8k():
    columns = dict(prompt_column="question", answer_column="answer", answer_pattern=r"####\s*(.+)")
    train, test = real("gsm8k_train.jsonl"), real("gsm8k_test.jsonl")
    task = source(path=str(train), eval_path=str(test), eval_problems=None, **columns).load(print)
    assert (len(task.train), len(task.heldout)) == (7473, 1319)
    assert task.train[0].prompt.startswith("Natalia sold clips to 48 of her friends in April")
    assert task.train[0].answer == "72"
    assert task.heldout[0].answer == "18"
    assert all(re.fullmatch(r"-?[\d,.]+", e.answer.strip()) for e in [*task.train, *task.heldout])


def test_math_sets():
    for name in ("math_sanity_1k5.jsonl", "math500.jsonl", "aime24.jsonl"):
        task = source(path=str(real(name)), prompt_column="problem", eval_problems=10).load(print)
        lines = real(name).read_text(encoding="utf-8").count("\n")
        assert len(task.train) + len(task.heldout) == lines
