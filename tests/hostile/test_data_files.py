"""Files that are no JSON lines, or odd ones: problems that can be trained on, or one line that names file and line."""

import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from cases import SMALL, Case, Server, failures, strict_json
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dppo_cli.data.file import File
from dppo_cli.errors import DppoError

Seeds = Callable[..., range]
GOOD = b'{"prompt": "1+1=", "answer": "2", "more": [1, {"a": null}]}'
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
# fmt: off
RAW = st.sampled_from([
    "NaN", "-Infinity", "1e999", "-0", "1" * 5000, "1e-400", r'"\ud800"', r'"\ud83d\ude00"', r'"\u0000"', "'a'", "01",
    "undefined", "[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 90 + "1" + "}" * 90, '"' + "x" * 100_000 + '"', "1.",
])
# fmt: on
NAMES = st.sampled_from(["prompt", "answer", "more", "prompts", "completions", "self", "", "a\nb", "é", "x" * 300])
ENDS = st.sampled_from(
    [b"\n"] * 6 + [b"\r\n", b"\r", b"\n\n", b"\x0b\n", b"\x0c", "\u2028".encode(), "\x85".encode(), b""]
)


@st.composite
def rows(draw: DrawFn) -> bytes:
    """A line: as it should be, or with other values, other columns, columns twice, or no JSON at all."""
    kind = draw(st.sampled_from(["good"] * 4 + ["values", "raw", "columns", "any", "bytes"]))
    if kind == "good":
        return GOOD
    if kind == "bytes":
        return draw(st.binary(max_size=20))
    if kind == "any":
        return json.dumps(draw(JSON)).encode()
    names = ["prompt", "answer", *draw(st.lists(NAMES, max_size=3))] if kind != "columns" else draw(st.lists(NAMES))
    texts = [draw(RAW) if kind == "raw" and draw(st.booleans()) else json.dumps(draw(JSON)) for _ in names]
    pairs = ", ".join(f"{json.dumps(name)}: {text}" for name, text in zip(names, texts, strict=True))
    return f"{{{pairs}}}".encode("utf-8", "surrogatepass")


@st.composite
def contents(draw: DrawFn) -> bytes:
    """A file: lines with ends of all kinds, and perhaps damaged, or in another encoding."""
    content = b"".join(row + draw(ENDS) for row in draw(st.lists(rows(), max_size=8)))
    kind = draw(st.sampled_from(["as it is"] * 5 + ["flip", "cut", "mark", "utf-16", "utf-32", "latin-1", "insert"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "flip" and content:
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if kind in ("utf-16", "utf-32", "latin-1"):
        return content.decode("utf-8", "replace").encode(kind, "replace")
    changed = {"cut": content[:place], "mark": b"\xef\xbb\xbf" + content}
    inserted = content[:place] + draw(st.binary(max_size=4)) + content[place:]
    return changed.get(kind, inserted if kind == "insert" else content)


OPTIONS = st.fixed_dictionaries(
    {
        "eval_problems": st.sampled_from([1, 1, 2, None, 10**9]),
        "prompt_column": st.sampled_from(["prompt"] * 4 + ["more", "", "é"]),
        "answer_column": st.sampled_from(["answer"] * 4 + ["prompt", "self"]),
        "answer_pattern": st.sampled_from([None, None, "(.*)", r"(\d+)", "(x)?", "()"]),
        "on_bad_row": st.sampled_from(["refuse", "refuse", "drop"]),
        "shuffle": st.sampled_from([None, None, 3]),
    }
)

OTHER = {"split": None, "eval_split": None, "prompt_template": None, "train_problems": None}
"""Options that stay as they are."""


def check(folder: Path, content: bytes, options: dict[str, object]) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(content)
    (folder / "heldout.jsonl").write_bytes(GOOD)
    heldout = str(folder / "heldout.jsonl") if options["eval_problems"] is None else None
    told: list[str] = []
    try:
        task = File(path=str(path), eval_path=heldout, **OTHER, **options).load(told.append)  # type: ignore[arg-type]
    except DppoError as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1 and text.isprintable(), text
        assert len(text) < 3000
        return
    assert all(text.isprintable() and len(text) < 3000 for text in told), told
    # A line is what a line feed ends; white space is no problem.
    lines = [
        line for line in content.split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").strip()
    ]
    dropped = sum(int(number[1]) for text in told if (number := re.match(r"(\d+) of \d+ ", text)))
    assert len(task.train) + (0 if heldout else len(task.heldout)) + dropped == len(lines)
    assert task.train and task.heldout
    assert not {e.prompt.strip() for e in task.train} & {e.prompt.strip() for e in task.heldout}
    for example in [*task.train, *task.heldout]:
        assert example.prompt.strip() and isinstance(example.answer, str)
        for text in (example.prompt, example.answer):
            text.encode()
        assert strict_json(json.dumps(example.columns, allow_nan=False)) == example.columns
        assert pickle.loads(pickle.dumps(example)) == example


def test_data_files(seeds: Seeds, tmp_path: Path) -> None:
    chosen = seeds(150, 10)

    @seed(chosen.start)
    @settings(
        max_examples=len(chosen),
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(contents(), OPTIONS)
    def examples(content: bytes, options: dict[str, object]) -> None:
        check(tmp_path, content, options)

    examples()


def test_runs_on_data_files(seeds: Seeds, servers: list[Server], prepared: Path, tmp_path: Path) -> None:
    found = failures(map(training, seeds(6, 100)), tmp_path, servers)
    assert found == "", found


def training(number: int) -> Case:
    """`dppo train` on lines that can be read, of odd text."""
    random = Random(number)
    odd = [
        "",
        "\0",
        "\n",
        "[/x]",
        "\x1b[2J",
        "é",
        "💥",
        "\u202e",
        "<|endoftext|>",
        "</s>",
        "{{ x }}",
        "9" * 60,
        "${seed}",
    ]
    rows = [{"prompt": f"{a}+1={random.choice(odd)}", "answer": random.choice(odd), "prompts": 1} for a in range(8)]
    rows[0] |= {random.choice(odd): random.choice(odd), "self": [None, {"a": 1e308}]}
    content = "".join(json.dumps(row) + "\n" for row in rows)
    reward = random.choice((["reward=exact"], ["reward=function", "reward.path=canary.py:f"]))
    words = ("train", "data=file", "data.path=data.jsonl", *SMALL, *reward)
    return Case(words, partial(_write, content), about=f"data {number}: {content!a}", may_run_canary=True)


def _write(content: str, work: Path) -> None:
    (work / "data.jsonl").write_text(content, encoding="utf-8")


@pytest.mark.parametrize("content", [GOOD + b"\n" + GOOD.replace(b"1+1", b"1+2"), GOOD * 2, b"\xff", b""])
def test_the_check_itself(content: bytes, tmp_path: Path) -> None:
    """A file that is read, and three that are refused."""
    options = {"eval_problems": 1, "prompt_column": "prompt", "answer_column": "answer", "answer_pattern": None}
    options |= {"on_bad_row": "refuse", "shuffle": None}
    check(tmp_path, content, options)
