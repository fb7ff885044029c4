"""A run in which an update meets a NaN: it ends, saved, or leaves this update out; the batch is kept either way."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, train
from torch import Tensor

from dppo_cli.training import learner as learner_module
from dppo_cli.training.learner import Learner
from dppo_cli.training.metrics import COST
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Group

WORDS = ("steps=4", "eval.every=0", "optim.lr=0.01", "optim.schedule=cosine", "adapter.dropout=0.1")
"""Two updates in each step."""
WEIGHTS = "adapter/adapter_model.safetensors"

Broken = Callable[..., list[list[Group]]]

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """`broken(3)`: log pi of the last token is NaN in the third update of each run that follows. Gives its groups."""

    def arrange(*numbers: int) -> list[list[Group]]:
        real_update, real_log_probs = Learner.update, learner_module.token_log_probs
        seen: list[list[Group]] = []
        count = 0

        def update(self: Learner, groups: Sequence[Group]) -> UpdateResult:
            nonlocal count
            count += 1
            if count in numbers:
                seen.append(list(groups))
            return real_update(self, groups)

        def log_probs(*args: Any) -> tuple[Tensor, Tensor]:
            logp_N, entropy_N = real_log_probs(*args)
            if count not in numbers:
                return logp_N, entropy_N
            factor_N = logp_N.new_ones(len(logp_N))
            factor_N[-1] = math.nan
            return logp_N * factor_N, entropy_N

        monkeypatch.setattr(Learner, "update", update)
        monkeypatch.setattr(learner_module, "token_log_probs", log_probs)
        return seen

    return arrange


def strict(text: str) -> Any:
    """JSON without NaN and infinity, which Python would take."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check_batch(path: Path, groups: Sequence[Group]) -> None:
    """The file describes these groups."""
    found = strict(path.read_text(encoding="utf-8"))
    assert [row["problem"] for row in found] == [group.prompt.index for group in groups]
    for row, group in zip(found, groups, strict=True):
        assert row["prompt"] == group.prompt.example.prompt
        assert row["prompt_token_ids"] == list(group.prompt.token_ids)
        of_each = zip(row["completions"], group.completions, group.scores, group.advantages, strict=True)
        for said, completion, score, advantage in of_each:
            assert said["text"] == completion.text
            assert said["token_ids"] == completion.token_ids_T.tolist()
            assert [float(value) for value in said["logp_mu"]] == completion.mu.logp_N.tolist()
            assert (said["reward"], said["advantage"]) == (score.value, advantage)


def names_a_token(text: str, groups: Sequence[Group]) -> bool:
    """Whether the message names a problem and one of its tokens at its position."""
    return any(
        f"token {token} at position {position} of a response to problem {group.prompt.index} "
        f"({group.prompt.example.prompt!r})" in text
        for group in groups
        for completion in group.completions
        for position, token in enumerate(completion.token_ids_T.tolist())
    )


def without_times(run: Path) -> list[str]:
    rows = [strict(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [json.dumps({key: value for key, value in row.items() if key not in COST}) for row in rows]


# Stop


def test_the_run_ends_saved_with_the_batch(
    model: Path, work: Path, broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second update of a step: what the first one did is undone."""
    assert train(model, *WORDS, "checkpoint.every=1", "checkpoint.keep=9", "run_dir=whole") == 0
    groups = broken(6)
    capsys.readouterr()
    assert train(model, *WORDS, "run_dir=run") == 1
    run = work / "run"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("dppo: step 3: the loss of 1 of ") and "tokens is not finite (nan): token " in error
    assert error.endswith(
        "; no weight was changed, and the batch is in run/nonfinite-step-3.json; the state after step 2 is saved; to "
        "go on: dppo train resume=run\n"
    )
    assert names_a_token(error, groups[0])
    check_batch(run / "nonfinite-step-3.json", groups[0])
    summary = read_json(run / "summary.json")
    assert (summary["steps"], summary["interrupted"], summary["eval_after"]) == (2, True, None)
    assert without_times(run) == without_times(work / "whole")[:2]
    assert (run / WEIGHTS).read_bytes() == (work / "whole/checkpoints/step-2" / WEIGHTS).read_bytes()


def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    model: Path, work: Path, broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if what was wrong had been mended."""
    assert train(model, *WORDS, "run_dir=whole") == 0
    with monkeypatch.context():
        broken(6)
        assert train(model, *WORDS, "run_dir=run") == 1
        monkeypatch.undo()
    monkeypatch.chdir(work)
    assert train(model, *WORDS, "resume=run") == 0
    assert (work / "run" / WEIGHTS).read_bytes() == (work / "whole" / WEIGHTS).read_bytes()
    assert without_times(work / "run") == without_times(work / "whole")


def test_a_nan_in_the_first_step_leaves_the_batch_alone(
    model: Path, work: Path, broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = broken(1)
    assert train(model, *WORDS, "run_dir=run") == 1
    assert capsys.readouterr().err.endswith(
        "the batch is in run/nonfinite-step-1.json; no step was finished; nothing is saved\n"
    )
    assert [path.name for path in (work / "run").iterdir()] == ["nonfinite-step-1.json"]
    check_batch(work / "run/nonfinite-step-1.json", groups[0])


# Skip


def test_an_update_is_left_out_and_the_run_goes_on(
    model: Path, work: Path, broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, *WORDS, "run_dir=whole") == 0
    groups = broken(4)
    capsys.readouterr()
    assert train(model, *WORDS, "optim.on_nonfinite=skip", "run_dir=run") == 0
    run = work / "run"
    summary = read_json(run / "summary.json")
    (warning,) = [text for text in summary["warnings"] if "not finite" in text]
    assert warning.startswith("step 2: the loss of 1 of ")
    assert warning.endswith(
        "; no weight was changed, and the batch is in run/nonfinite-step-2.json; this update is left out"
    )
    assert names_a_token(warning, groups[0])
    # Told on the console, too, whose lines are broken.
    assert "this update is left out" in " ".join(capsys.readouterr().out.split())
    check_batch(run / "nonfinite-step-2.json", groups[0])
    assert (summary["steps"], summary["interrupted"]) == (4, False)
    (one, two, *later), (first, second, *others) = rows(run), rows(work / "whole")
    assert one == first
    assert [row["lr"] for row in (two, *later)] == [row["lr"] for row in (second, *others)]
    # Of two updates one is left.
    assert two["reward"] == second["reward"] and two["gradient_norm"] != second["gradient_norm"]
    assert [row["gradient_norm"] > 0 for row in later] == [True, True]
    assert (run / WEIGHTS).read_bytes() != (work / "whole" / WEIGHTS).read_bytes()


def rows(run: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in without_times(run)]


def test_a_step_of_which_every_update_is_left_out(
    model: Path, work: Path, broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = broken(3, 4)
    assert (
        train(model, *WORDS, "optim.on_nonfinite=skip", "checkpoint.every=1", "checkpoint.keep=9", "run_dir=run") == 0
    )
    run = work / "run"
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[1]["gradient_norm"] is None and found[1]["entropy"] is None
    assert (found[1]["skipped"], found[1]["padding"]) == (0.0, 0.0)
    assert found[1]["reward"] is not None
    assert all(row["gradient_norm"] > 0 for row in (found[0], *found[2:]))
    before, after = (run / f"checkpoints/step-{n}" / WEIGHTS for n in (1, 2))
    assert before.read_bytes() == after.read_bytes()
    texts = read_json(run / "summary.json")["warnings"]
    assert sum("this update is left out" in text for text in texts) == 2
    assert not [text for text in texts if "Console" in text or "Watch" in text or "MaskedTokens" in text]
    # Each warning names a file that has its own batch.
    kept = [
        run.parent / text.partition("the batch is in ")[2].partition(";")[0] for text in texts if "left out" in text
    ]
    assert len(set(kept)) == 2
    for path, batch in zip(kept, groups, strict=True):
        check_batch(path, batch)


def test_a_run_of_which_every_update_is_left_out(model: Path, work: Path, broken: Broken) -> None:
    broken(1, 2, 3, 4)
    assert train(model, *WORDS, "steps=2", "optim.on_nonfinite=skip", "run_dir=run") == 0
    assert [row["gradient_norm"] for row in rows(work / "run")] == [None, None]
    assert strict((work / "run/summary.json").read_text())["eval_after"] is not None
    assert strict((work / "run/masked_tokens.json").read_text()) is not None
