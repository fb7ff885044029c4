"""Sets on the hub, from a local server that answers as the hub does, and from the cache that `datasets` then has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import pytest
from sources import OPTIONS

from dppo_cli.data.hub import Hub
from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError, DataError

ROWS: fake_hub.Rows = [{"question": f"{n}+1=", "answer": f"so #### {n + 1}", "level": n} for n in range(6)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub with a few sets; the folder with its files."""
    root = tmp_path / "hub"
    gsm8k = {"main": {"train": ROWS[:4], "test": ROWS[3:]}, "socratic": {"train": ROWS}}
    for name, configs in {"openai/gsm8k": gsm8k, **{f"me/{n}": {"default": {"train": ROWS}} for n in "ab"}}.items():
        fake_hub.add_set(root, name, configs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with fake_hub.serving(root, gated=("me/b",)) as address:
        fake_hub.use(monkeypatch, address, tmp_path / "cache")
        yield root


def source(**fields: Any) -> Hub:
    place = {"name": "openai/gsm8k", "config": "main", "revision": None, "split": "train", "eval_split": "test"}
    columns = {"prompt_column": "question", "answer_pattern": r"####\s*(.+)"}
    return Hub(**{**place, **OPTIONS, **columns, **fields})


def load(**fields: Any) -> tuple[Task, list[str]]:
    told: list[str] = []
    return source(**fields).load(told.append), told


def refused(**fields: Any) -> str:
    with pytest.raises(DataError) as error:
        load(**fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_two_splits_of_a_set(hub: Path) -> None:
    task, told = load()
    assert [(e.prompt, e.answer) for e in task.train] == [("0+1=", "1"), ("1+1=", "2"), ("2+1=", "3")]
    assert [e.prompt for e in task.heldout] == ["3+1=", "4+1="]
    assert task.train[1].columns == {"question": "1+1=", "answer": "2", "level": 1}
    assert told == [
        "1 of 4 training problems of openai/gsm8k, split train are held-out problems, too, and were dropped"
    ]


def test_a_part_of_one_split_is_held_out(hub: Path) -> None:
    task, told = load(name="me/a", config=None, eval_split=None)
    assert ([e.prompt for e in task.heldout], len(task.train), told) == (["4+1=", "5+1="], 4, [])
    assert "me/a, split train has 6 problems, and data.eval_problems=6" in refused(
        name="me/a", config=None, eval_split=None, eval_problems=6
    )


def test_training_problems_as_held_out_ones_on_request(hub: Path) -> None:
    task, told = load(eval_split="train")
    assert (len(task.train), [e.prompt for e in task.heldout]) == (4, ["0+1=", "1+1="])
    assert "accuracy is that of training" in told[0]


def test_a_split_to_evaluate_on_only(hub: Path) -> None:
    task, told = load(split=None, eval_split="test", eval_problems=None)
    assert (list(task.train), len(task.heldout), told) == ([], 3, [])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "openai/gsm9k"}, "there is no data set openai/gsm9k on the hub (data.name), or it is private"),
        ({"config": None}, "openai/gsm8k has the configs main, socratic; choose one: data.config=main"),
        ({"config": "mein"}, "openai/gsm8k has no config 'mein' (data.config); did you mean 'main'?"),
        ({"split": "trian"}, "openai/gsm8k has no split 'trian' (data.split); did you mean 'train'? Choices: test, tr"),
        ({"eval_split": "val"}, "openai/gsm8k has no split 'val' (data.eval_split). Choices: test, train"),
        ({"revision": "v9"}, "openai/gsm8k has no revision 'v9' (data.revision)"),
        ({"name": "me/b", "config": None}, "me/b is gated: accept its terms at https://huggingface.co/datasets/me/b"),
        ({"name": "a--b/c"}, "data.name=a--b/c is no name on the hub: "),
        ({"prompt_column": "q"}, "openai/gsm8k, split train, row 0: there is no column 'q' (data.prompt_column)"),
        ({"answer_pattern": "(4)"}, "openai/gsm8k, split train, row 0: data.answer_pattern='(4)' does not match "),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(hub: Path, fields: dict[str, Any], words: str) -> None:
    assert words in refused(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "gsm8k"}, "data.name=gsm8k is no name on the hub; expected owner/name"),
        ({"name": "json"}, "is no name on the hub"),
        ({"name": "../../x"}, "is no name on the hub"),
        ({"split": None, "eval_split": None}, "data.split and data.eval_split are null"),
        ({"eval_split": None, "eval_problems": None}, "set data.eval_split, or data.eval_problems"),
    ],
)
def test_fields_that_cannot_work(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        source(**fields)
    assert words in str(error.value)


def test_bad_rows_of_a_set_are_dropped_and_told(hub: Path) -> None:
    task, told = load(on_bad_row="drop", answer_pattern="#### ([^2])")
    assert [e.answer for e in task.train] == ["1", "3"]
    assert "1 of 4 rows were dropped (data.on_bad_row=drop); the first: openai/gsm8k, split train, row 1: " in told[0]


def test_a_folder_of_the_same_name_is_not_taken_for_the_set(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "openai/gsm8k").mkdir(parents=True)
    (tmp_path / "openai/gsm8k/train.jsonl").write_text('{"question": "planted", "answer": "#### 1"}\n')
    assert load()[0].train[0].prompt == "0+1="


def test_a_set_is_loaded_once_and_then_comes_from_the_cache(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = load()
    assert capfd.readouterr() == ("", ""), "no progress bars"
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert {path.parts[0] for path in files} == {"hub", "cache"}, "nothing lies in the working folder"
    fake_hub.offline(monkeypatch, True)
    assert load() == before
    assert "openai/gsm8k has no config 'mein' (data.config)" in refused(config="mein")
    assert "openai/gsm8k has no split 'val' (data.eval_split)" in refused(eval_split="val")
    assert "me/a is not in the cache, and the hub cannot be reached; connect once" in refused(name="me/a")
    fake_hub.offline(monkeypatch, False)
    load(config="socratic", eval_split=None)
    fake_hub.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    task, told = load()
    assert (task, told) == (before[0], ["the hub cannot be reached; openai/gsm8k comes from the cache", *before[1]])
    assert "openai/gsm8k has the configs main, socratic; choose one: data.config=main" in refused(config=None)
    assert "me/a is not in the cache, and the hub cannot be reached" in refused(name="me/a")


def test_a_token_is_in_no_message(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("403 for hf_secret\nat line 2")

    monkeypatch.setattr("datasets.load_dataset", fail)
    assert refused() == "openai/gsm8k cannot be loaded: 403 for *** at line 2"
