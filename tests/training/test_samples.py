"""The samples of a run: which are kept, what each line says, and what becomes of them when room is short."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from disturbed import contents

from dppo_cli.config.sections import SamplesKept
from dppo_cli.errors import ConfigError
from dppo_cli.training.run_folder import RunFolder, sample_steps
from dppo_cli.training.samples import StepSamples
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Completion, Group, PolicyReport, SampleStats, Score, Status, TokenStats

HOSTILE = '\ud800a\udc00 \x00\x1b[31m\u202eabc\u2028\n"\\ \U0001f600'
REPAIRED = HOSTILE.replace("\ud800", "�").replace("\udc00", "�")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "run", "steps: 1\n", 0)


def keeper(
    every: int = 10,
    groups: int = 4,
    max_mib: float = 1.0,
    steps: int = 1000,
    decode: Callable[[Sequence[int]], str] = str,
    warn: Callable[[str], None] = make.fail,
) -> StepSamples:
    return StepSamples(SamplesKept(every, groups, max_mib), steps, decode, warn)


def group(*advantages: float, text: str = "") -> Group:
    completions = [make.completion(text=text) for _ in advantages]
    return Group(make.prompt(), completions, [Score(0.0)] * len(completions), list(advantages))


def result(*kept: SampleStats) -> UpdateResult:
    return UpdateResult([], list(kept), 1.0, 0.1, len(kept), 0, 0, 0)


def seen(of: Completion, stats: TokenStats, top_NK: torch.Tensor | None = None) -> SampleStats:
    return SampleStats(of, stats, top_NK)


def kept_rows(folder: RunFolder, samples: StepSamples, groups: list[Group], *updates: UpdateResult) -> list[Any]:
    """The lines of step 1."""
    with folder:
        samples.keep(folder, 1, samples.chosen(1, groups), updates)
        text = (folder.path / "samples/step-1.jsonl").read_text("utf-8")
        # A line for each, whatever is in them: no reader breaks lines elsewhere.
        assert text.isascii() and text.splitlines() == text.split("\n")[:-1]
        folder.log({"step": 1})
        return [json.loads(line, parse_constant=make.fail) for line in text.splitlines()]


def test_what_a_line_says_of_a_sample(folder: RunFolder) -> None:
    first = make.completion([5, 9, 7], text="five", logp=[-0.5, -2.0], sampled=[True, False, True], status=Status.CUT)
    second = make.completion([8], text="eight", logp=[-1.0])
    scores = [Score(1 / 3, {"exact": 1.0, "late": None}, "slow"), Score(None, note="timed out")]
    one = Group(make.prompt(7, [3, 4], "42"), [first, second], scores, [0.25, 0.0])
    stats = make.token_stats([0.6, 0.1], [0.3, 0.2], [0.25] * 2, keep=[True, False], divergence=[0.3, 0.1234567890])
    later = make.token_stats([0.6, 0.1], [0.1, 0.1], [0.25] * 2, divergence=[0.5, 0.5])
    rows = kept_rows(folder, keeper(), [one], result(seen(first, stats)), result(seen(first, later)))
    assert rows[0] == {
        "step": 1,
        "problem": 7,
        "sample": 0,
        "prompt": "(3, 4)",
        "answer": "42",
        "completion": "five",
        "status": "cut",
        "score": 0.333333,
        "parts": {"exact": 1.0, "late": None},
        "note": "slow",
        "advantage": 0.25,
        "token_ids": [5, 9, 7],
        "tokens": ["[5]", "[9]", "[7]"],
        "sampled": [True, False, True],
        "logp_mu": [-0.5, None, -2.0],
        # log mu and the ratio of the first update, which is 1/2 and 2.
        "logp_pi": [-1.19315, None, -1.30685],
        "divergence": [0.3, None, 0.123457],
        "keep": [True, None, False],
        "filtered": [False, None, False],
        "top_ids": None,
        "top_logp_mu": None,
        "top_logp_pi": None,
        "top_texts": None,
    }
    # It was in no update: what the sampler knew is there.
    assert (rows[1]["score"], rows[1]["note"], rows[1]["advantage"]) == (None, "timed out", 0.0)
    assert [rows[1][name] for name in ("logp_mu", "logp_pi", "divergence", "keep")] == [[-1.0], [None], [None], [None]]


def test_the_most_likely_tokens(folder: RunFolder) -> None:
    ids, logs = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[-0.1, -2.5], [-1.0, -torch.inf]])
    report = PolicyReport(torch.tensor([-0.1, -1.0]), ids, logs)
    one, other = (
        replace(make.completion([5, 9, 7], logp=[0.0, 0.0], sampled=[True, False, True]), mu=report) for _ in range(2)
    )
    pi = torch.tensor([[-0.25, -1.5], [-0.75, torch.nan]])
    stats = seen(one, make.token_stats([0.5] * 2, [0.5] * 2, [1.0] * 2), pi)
    rows = kept_rows(folder, keeper(), make.groups([make.prompt()], [[one, other]], [1.0, 0.0]), result(stats))
    for row in rows:
        assert row["top_ids"] == [[1, 2], [], [3, 4]]
        assert row["top_logp_mu"] == [[-0.1, -2.5], [], [-1.0, None]]
        assert row["top_texts"] == {"1": "[1]", "2": "[2]", "3": "[3]", "4": "[4]"}
    assert rows[0]["top_logp_pi"] == [[-0.25, -1.5], [], [-0.75, None]]
    assert rows[1]["top_logp_pi"] == [[None, None], [], [None, None]]


def test_texts_that_readers_of_json_refuse_are_repaired(folder: RunFolder) -> None:
    score = Score(math.inf, {HOSTILE: math.nan}, HOSTILE)
    one = Group(make.prompt(0, [3], HOSTILE), [make.completion([5], text=HOSTILE)], [score], [1.0])
    (row,) = kept_rows(folder, keeper(decode=lambda ids: HOSTILE), [one])
    assert row["prompt"] == row["answer"] == row["completion"] == row["note"] == row["tokens"][0] == REPAIRED
    assert (row["score"], row["parts"]) == (None, {REPAIRED: None})


def test_groups_that_teach_something_come_first() -> None:
    groups = [group(0.0, 0.0), group(1.0, -1.0), group(), group(0.0, 0.5), group(0.0)]
    for number, expected in ((1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3, 4])):
        chosen = keeper(groups=number).chosen(1, groups)
        assert [g for g, one in enumerate(chosen) if one.kept] == expected
        assert [replace(one, kept=False) for one in chosen] == groups


def test_the_first_the_last_and_every_so_many_steps_are_kept() -> None:
    def steps(samples: StepSamples) -> list[int]:
        return [step for step in range(1, 26) if samples.chosen(step, [group(1.0)])[0].kept]

    assert steps(keeper(every=10, steps=25)) == [1, 10, 20, 25]
    assert steps(keeper(every=1, steps=25)) == list(range(1, 26))
    assert steps(keeper(every=0, steps=25)) == []


# Room


def grown(folder: RunFolder, samples: StepSamples, steps: range) -> None:
    """What a run does; its files have about 10 KiB, and are of different sizes."""
    for step in steps:
        groups = samples.chosen(step, [group(1.0, text="x" * (9000 + 13 * step))])
        folder.log({"step": step})
        samples.keep(folder, step, groups, [])


def size_of(run: Path) -> int:
    return sum(len(content) for content in contents(run / "samples").values())


def test_a_long_run_is_covered_evenly(folder: RunFolder) -> None:
    samples = keeper(every=2, max_mib=0.1, steps=101)
    with folder:
        grown(folder, samples, range(1, 10))
        assert sample_steps(folder.path) == [1, 2, 4, 6, 8]
        grown(folder, samples, range(10, 102))
        # About ten files fit, and twelve of every eight steps were too many.
        assert sample_steps(folder.path) == [1, 16, 32, 48, 64, 80, 96, 101]
        assert size_of(folder.path) == sum(samples.sizes.values()) <= 0.1 * 2**20


@pytest.mark.parametrize(("saved", "died"), [(9, 17), (9, 60), (37, 99), (70, 71)])
def test_a_run_that_goes_on_has_the_files_of_one_that_was_not_stopped(
    folder: RunFolder, saved: int, died: int, tmp_path: Path
) -> None:
    """Files that the steps which run again had removed already included."""

    def made() -> StepSamples:
        return keeper(every=2, max_mib=0.1, steps=101)

    with folder:
        grown(folder, made(), range(1, 102))
    with RunFolder(tmp_path / "other", "steps: 1\n", 0) as other:
        samples = made()
        grown(other, samples, range(1, saved + 1))
        state = json.loads(json.dumps(samples.state()))
        grown(other, samples, range(saved + 1, died + 1))
        other.cut(saved)
        assert max(sample_steps(other.path)) <= saved
        samples = made()
        samples.load_state(state)
        grown(other, samples, range(saved + 1, 102))
    assert contents(other.path / "samples") == contents(folder.path / "samples")


def test_samples_that_are_too_large_by_themselves_remove_no_others(folder: RunFolder) -> None:
    told: list[str] = []
    samples = keeper(every=1, max_mib=0.05, warn=told.append)
    with folder:
        grown(folder, samples, range(1, 4))
        for step in (4, 5):
            samples.keep(folder, step, samples.chosen(step, [group(1.0, text="x" * 50_000)]), [])
        assert sample_steps(folder.path) == [1, 2, 3]
        grown(folder, samples, range(6, 7))
        assert sample_steps(folder.path) == [1, 2, 3, 6]
    assert told == [
        "the samples of step 4 are not kept: they take 0.0481 MiB, which samples.max_mib=0.05 has no room for; lower "
        "samples.groups=4"
    ]


def test_a_disk_that_is_full_is_told_once_and_samples_come_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    samples = keeper(every=1, warn=told.append)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with folder:
        grown(folder, samples, range(1, 2))
        groups = samples.chosen(2, [group(1.0)])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            samples.keep(folder, 2, groups, [])
            samples.keep(folder, 3, groups, [])
        assert [path.name for path in (folder.path / "samples").iterdir()] == ["step-1.jsonl"]
        grown(folder, samples, range(4, 5))
        assert sample_steps(folder.path) == [1, 4]
    assert told == ["the samples of step 2 could not be written: No space left on device; the run goes on without them"]


def test_a_tokenizer_that_fails_does_not_end_the_run(folder: RunFolder) -> None:
    def broken(ids: Sequence[int]) -> str:
        raise IndexError("no such token")

    told: list[str] = []
    samples = keeper(decode=broken, warn=told.append)
    with folder:
        samples.keep(folder, 1, samples.chosen(1, [group(1.0)]), [])
    assert told == [
        "the samples of step 1 could not be written: IndexError: no such token; the run goes on without them"
    ]


def test_values_out_of_range_are_refused() -> None:
    for values, key in (((-1, 1, 1.0), "every"), ((1, 0, 1.0), "groups"), ((1, 1, 0.0), "max_mib")):
        with pytest.raises(ConfigError, match=rf"samples\.{key}"):
            SamplesKept(*values)
