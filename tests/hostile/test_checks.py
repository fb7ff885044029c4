"""The checks of the hostile tests find what they are there for."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
from cases import SMALL, Case, Result, Server, problems, run
from damage import KINDS, Damage
from safetensors.torch import save_file

FUNCTION = ("train", "data.train_problems=32", *SMALL, "reward=function", "reward.path=canary.py:f")


def result(
    work: Path,
    status: int | None = 0,
    err: str = "",
    out: str = "",
    new: Sequence[str] = (),
    changed: Sequence[str] = (),
) -> Result:
    return Result(Case(("train",), named=("out",)), status, out, err, work, [*new], [*changed], [])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"status": 2, "err": "dppo: no\n"}, []),
        ({"status": 1, "err": "dppo: NaN\n"}, []),
        ({"new": ["work/out/x", "work/runs", "config/dppo/key"]}, []),
        ({"status": None}, ["hangs"]),
        ({"status": -9}, ["exit status -9"]),
        ({"status": 143, "err": "dppo: stopped\n"}, ["exit status 143"]),
        ({"status": 2, "err": ""}, ["not one line"]),
        ({"status": 2, "err": "dppo: a\nb\n"}, ["not one line"]),
        ({"status": 2, "err": "dppo: a\u2028b\n"}, ["not one line"]),
        ({"status": 2, "err": "warning\n"}, ["not one line"]),
        ({"status": 2, "err": "dppo: \n"}, ["empty"]),
        ({"status": 2, "err": f"dppo: {'x' * 4000}\n"}, ["4007 characters"]),
        ({"status": 1, "err": "Traceback\nValueError: x\n"}, ["Traceback: ValueError: x"]),
        ({"status": 2, "err": "dppo: a\n", "out": "Traceback"}, ["Traceback"]),
        ({"err": "warning\n"}, ["on stderr: warning"]),
        ({"err": "sampling 2 problems ...\nsampling 2 problems: 5 s\n"}, []),
        ({"new": ["work/x"]}, ["wrote 'work/x'"]),
        ({"new": ["temporary/x"]}, ["wrote 'temporary/x'"]),
        ({"changed": ["home/.profile"]}, ["changed 'home/.profile'"]),
        ({"status": 2, "err": "dppo: a\n", "new": ["work/runs", "work/out"]}, ["left 'work/out'"]),
    ],
)
def test_endings_and_places(made: dict[str, object], words: list[str], tmp_path: Path) -> None:
    found = problems(result(tmp_path / "work", **made))  # type: ignore[arg-type]
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_a_file_may_be_overwritten_on_request(tmp_path: Path) -> None:
    made = result(tmp_path / "work", changed=["work/empty"])
    for words, count in ((("report", "++out=empty", "overwrite=true"), 0), (("report", "out=empty"), 1)):
        assert len(problems(replace(made, case=replace(made.case, words=words)))) == count


@pytest.mark.parametrize(
    ("summary", "steps", "value", "words"),
    [
        ({}, [1, 2], 1.0, None),
        ({"eval_after": None}, [1, 2], 1.0, None),
        ({"eval_after": 1.5}, [1, 2], 1.0, "eval_after=1.5"),
        ({"eval_after": float("nan")}, [1, 2], 1.0, "NaN is not JSON"),
        ({}, [1], 1.0, "steps [1] of 2"),
        ({}, [1, float("inf")], 1.0, "Infinity is not JSON"),
        ({}, [1, 2], float("nan"), "not finite"),
    ],
)
def test_results(
    summary: dict[str, float], steps: list[float], value: float, words: str | None, tmp_path: Path
) -> None:
    out = tmp_path / "work/out"
    (out / "adapter").mkdir(parents=True)
    whole = {"eval_before": 0.0, "eval_after": 1.0, "steps": 2, **summary}
    (out / "summary.json").write_text(json.dumps(whole))
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    save_file({"a": torch.full((2,), value)}, out / "adapter/adapter_model.safetensors")
    found = problems(result(tmp_path / "work", new=["work/out/summary.json"]))
    assert (words is None and found == []) or (len(found) == 1 and words is not None and words in found[0])


@pytest.mark.parametrize(
    ("first", "second", "mean", "is_right"),
    [(0.25, 0.5, -0.25, True), (0.25, 0.5, 0.25, False), (1.5, 0.5, 1.0, False), (None, 0.5, None, True)],
)
def test_a_comparison(first: float | None, second: float, mean: float | None, is_right: bool, tmp_path: Path) -> None:
    out = tmp_path / "work/out"
    out.mkdir(parents=True)
    sides = {"first": {"accuracy": first}, "second": {"accuracy": second}}
    (out / "summary.json").write_text(json.dumps({**sides, "difference": None if mean is None else {"mean": mean}}))
    assert (problems(result(tmp_path / "work", new=["work/out/summary.json"])) == []) is is_right


def test_what_runs_is_seen(servers: list[Server], tmp_path: Path) -> None:
    """The function of a reward runs in a process of its own: its canary is seen, though not the audit."""
    allowed = run(Case(FUNCTION, may_run_canary=True), tmp_path / "allowed", servers[0])
    assert problems(allowed) == [] and allowed.status == 0
    assert problems(run(Case(FUNCTION), tmp_path / "not", servers[0])) == ["ran the canary"]
    inside = run(Case(("train", *SMALL, "divergence._target_=canary.Mine")), tmp_path / "inside", servers[0])
    assert inside.status == 2
    found = problems(inside)
    assert any(text.startswith("did: exec ") for text in found) and "ran the canary" in found


def test_what_is_written_elsewhere_is_seen(servers: list[Server], tmp_path: Path, prepared: Path) -> None:
    away = tmp_path / "away"
    words = ("export", f"run={prepared / 'finished'}", f"out={away}")
    found = problems(run(Case(words), tmp_path / "case", servers[0]))
    assert (away / "adapter_model.safetensors").is_file()
    assert any(text.startswith(f"did: os.rename '{tmp_path}/.export-") for text in found)


def test_what_hangs_is_killed(servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "SECONDS", 0.05)
    found = run(Case(("train", "data.train_problems=32", *SMALL)), tmp_path / "case", servers[0])
    assert found.status is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_damage_changes_the_run(kind: str, prepared: Path, tmp_path: Path, copy: Callable[[Path], Path]) -> None:
    how: dict[str, tuple[str, tuple[object, ...]]] = {
        "truncate": ("metrics.jsonl", (0.5,)),
        "delete": ("adapter", ()),
        "flip": ("config.yaml", (0.5, 3)),
        "append": ("config.yaml", (b"x",)),
        "overwrite": ("summary.json", ("{}",)),
        "replace": ("checkpoints/step-1/state.json", ("pipe",)),
        "edit_json": ("checkpoints/step-1/state.json", (0.0, "x", True)),
        "edit_yaml": ("config.yaml", (0.5, None)),
        "retarget": ("config.yaml", (0.5, "canary.Mine")),
        "edit_tensors": ("checkpoints/step-1/state.safetensors", (0.5, "longer", True)),
        "lie": ("adapter/adapter_model.safetensors", ("shape", False)),
        "edit_manifest": ("checkpoints/step-1/manifest.json", (0.5, "x")),
        "copy": ("checkpoints/step-1", ("step-9",)),
        "swap": ("checkpoints/step-1", ("step-2",)),
        "make": ("checkpoints", ("step-9", "/dev/zero")),
    }
    made = copy(prepared / "finished")
    before = cases.tree(made)
    path, arguments = how[kind]
    Damage(kind, path, arguments).do(made)
    assert cases.tree(made) != before


def test_no_damage_reaches_through_a_link(prepared: Path, copy: Callable[[Path], Path]) -> None:
    made = copy(prepared / "finished")
    Damage("replace", "config.yaml", ("beside",)).do(made)
    target = (made / "config.yaml").resolve()
    target.parent.mkdir()
    target.write_text("mine")
    Damage("overwrite", "config.yaml", ("x",)).do(made)
    assert target.read_text() == "mine"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a run where the damages expect one."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "work/run"))
