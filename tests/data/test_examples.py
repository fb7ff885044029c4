"""From rows to problems: conversations, templates, bad rows, order, and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sources import source

from dppo_cli.data.task import Task
from dppo_cli.errors import DataError

Load = Callable[..., tuple[Task, list[str]]]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1="}
ASSISTANT = {"role": "assistant", "content": "2"}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The task of these rows and what was told. A row that is text is a line as it is."""
    monkeypatch.chdir(tmp_path)

    def loaded(rows: list[Any], **fields: Any) -> tuple[Task, list[str]]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        told: list[str] = []
        return source(**fields).load(told.append), told

    return loaded


def rows(*prompts: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": str(n)} for n, prompt in enumerate(prompts)]


# Conversations


def test_a_list_of_messages_is_a_conversation(load: Load) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]
    chat = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": parts, "name": "me"}]
    task, _ = load(rows(chat, "plain", "x"), eval_problems=1)
    first, second = task.train
    assert first.messages == [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "1+2="}]
    assert (first.prompt, first.answer) == ("1+2=", "0")
    assert first.columns == {"prompt": chat, "answer": "0"}
    assert (second.prompt, second.messages) == ("plain", ())


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the list of messages is empty"),
        ([USER, ASSISTANT], "the last message is the assistant's, which is what the model is to write; leave it out"),
        ([USER, {"role": "tool", "content": "2"}], "message 2 has the role 'tool'; expected system, user, assistant"),
        ([{"role": None, "content": "2"}], "message 1 has the role 'None'"),
        ([{"role": ["user"], "content": "2"}], "message 1 has the role \"['user']\""),
        ([{"content": "2"}], "message 1 is no object with the keys role and content"),
        (["hello"], "message 1 is no object with the keys role and content"),
        ([{"role": "user", "content": None}], "message 1 holds something else than text; only text can be trained on"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 holds something else than text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 holds something else than text"),
        ([{"role": "user", "content": ["x"]}], "message 1 holds something else than text"),
        ([{"role": "user", "content": " "}], "the prompt is empty"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_answered(load: Load, messages: list[Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        load(rows("p", messages))
    assert str(error.value).startswith(f"train.jsonl, line 2: {words}")


# Columns


def test_a_prompt_made_from_columns(load: Load) -> None:
    template = "Make {target} from {nums} ({more.how}) in \\boxed{}, {} or { target }."
    problems = [{"nums": [1, 2], "target": n, "more": {"how": "é"}} for n in range(3)]
    fields = {"prompt_template": template, "prompt_column": None, "answer_column": "target"}
    task, _ = load(problems, **fields)
    assert task.train[0].prompt == "Make 0 from [1, 2] (é) in \\boxed{}, {} or { target }."
    assert task.train[0].columns == {"nums": [1, 2], "target": "0", "more": {"how": "é"}}
    for problem, words in (
        ({"nums": [1], "target": 1, "more": {}}, r"no column 'more\.how' \(data\.prompt_template\)"),
        (
            {"nums": None, "target": 1, "more": {"how": 1}},
            r"column 'nums' holds NoneType; expected text, a number or a",
        ),
    ):
        with pytest.raises(DataError, match=rf"line 1: .*{words}"):
            load([problem], **fields)


def test_a_column_within_a_column(load: Load) -> None:
    problems = [{"q": {"text": f"p{n}"}, "reward_model": {"ground_truth": n, "style": "rule"}} for n in range(3)]
    problems[0]["reward_model.ground_truth"] = "a column of that very name comes first"  # type: ignore[assignment]
    task, _ = load(problems, prompt_column="q.text", answer_column="reward_model.ground_truth", eval_problems=2)
    assert [e.prompt for e in [*task.train, *task.heldout]] == ["p0", "p1", "p2"]
    assert [e.answer for e in task.heldout] == ["1", "2"]
    assert task.train[0].answer.startswith("a column")
    assert task.heldout[0].columns == problems[1]


def test_a_set_without_answers(load: Load) -> None:
    task, _ = load([{"prompt": f"p{n}"} for n in range(3)], answer_column=None)
    assert [(e.answer, e.columns) for e in task.train] == [("", {"prompt": "p0"})]


# Bad rows


def test_bad_rows_are_dropped_counted_and_told_once(load: Load) -> None:
    lines = ["{", {"prompt": "a", "answer": 1}, {"prompt": " ", "answer": 1}, {"q": 1}, *rows("b", "c")]
    task, told = load(lines, on_bad_row="drop")
    assert [e.prompt for e in [*task.train, *task.heldout]] == ["a", "b", "c"]
    (text,) = told
    assert text.startswith("3 of 6 rows were dropped (data.on_bad_row=drop); the first: train.jsonl, line 1: no valid")
    assert text.endswith("; bad, too: line 3, 4")
    with pytest.raises(DataError, match=r"^train\.jsonl, line 1: no valid JSON.*; bad, too: line 3, 4$"):
        load(lines, on_bad_row="refuse")
    with pytest.raises(DataError, match=r"; bad, too: line 4, 6, 8, 10, 12, 14, 16, 18, 20$"):
        load([{"q": 1} if n % 2 else row for n, row in enumerate(rows(*map(str, range(40))))], on_bad_row="refuse")
    with pytest.raises(DataError, match=r"line 1: there is no column 'prompt'[^;]*$"):
        load([{"q": 1}] * 3, on_bad_row="refuse")
    with pytest.raises(
        DataError, match=r"train\.jsonl has no usable row; 2 were dropped, the first: .*line 1: no valid"
    ):
        load(["{", "[]"], on_bad_row="drop")


def test_a_file_that_is_no_json_lines_at_all_is_not_dropped_line_by_line(load: Load, tmp_path: Path) -> None:
    load(rows("a", "b", "c"))
    (tmp_path / "train.jsonl").write_bytes((tmp_path / "train.jsonl").read_text().encode("utf-16"))
    with pytest.raises(DataError, match="it is UTF-16 or UTF-32 text"):
        source(on_bad_row="drop").load(print)


# Order, limits and what is held out


def test_the_order_is_that_of_the_seed(load: Load) -> None:
    prompts = [f"p{n}" for n in range(100)]
    plain, first, again, other = (load(rows(*prompts), shuffle=seed)[0] for seed in (None, 1, 1, 2))
    assert [e.prompt for e in [*plain.train, *plain.heldout]] == prompts
    assert first == again
    orders = [[e.prompt for e in [*task.train, *task.heldout]] for task in (first, other)]
    assert sorted(orders[0]) == sorted(prompts) and orders[0] != prompts and orders[0] != orders[1]
    limited, _ = load(rows(*prompts), shuffle=1, train_problems=5)
    assert (limited.train, limited.heldout) == (first.train[:5], first.heldout)


def test_a_limit_above_what_there_is_limits_nothing(load: Load) -> None:
    task, _ = load(rows("a", "b", "c"), train_problems=9, eval_problems=1)
    assert (len(task.train), len(task.heldout)) == (2, 1)


def test_no_prompt_is_trained_on_and_held_out(load: Load) -> None:
    task, told = load(rows("a", "b ", "c", "b", "b", "d"), eval_problems=2)
    assert [e.prompt for e in task.train] == ["a", "c"]
    assert [e.prompt for e in task.heldout] == ["b", "d"]
    assert told == ["2 of 4 training problems of train.jsonl are held-out problems, too, and were dropped"]
    chats = [[SYSTEM, USER], [USER], [{"role": "user", "content": "Be brief."}, USER]]
    task, told = load(rows(*chats), eval_problems=1)
    assert [len(e.messages) for e in task.train] == [1], "the same text, in messages of other roles, is the same"
    with pytest.raises(DataError, match=r"all 2 training problems of train\.jsonl are held-out problems, too"):
        load(rows("a", "a", "a"), eval_problems=1)


def test_training_problems_as_held_out_ones_on_request(load: Load, tmp_path: Path) -> None:
    """The same file by another name, too: it can only be meant."""
    load(rows("a", "b", "c"))
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    told: list[str] = []
    for name in ("train.jsonl", str(tmp_path / "link.jsonl")):
        task = source(eval_path=name, eval_problems=2).load(told.append)
        assert [e.prompt for e in task.train] == ["a", "b", "c"]
        assert task.heldout == task.train[:2]
    assert (
        told == ["held-out problems are training problems: both are train.jsonl, so accuracy is that of training"] * 2
    )


def test_a_set_to_evaluate_on_only(load: Load) -> None:
    load(rows("a", "b", "c"))
    task = source(path=None, eval_path="train.jsonl", eval_problems=None).load(print)
    assert (list(task.train), [e.prompt for e in task.heldout]) == ([], ["a", "b", "c"])
