"""Commands on broken run folders, and what they may not do."""

import functools
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import damage
import torch
from cases import SMALL, Case, Result, Server, problems, run
from damage import WEIGHTS, Damage
from safetensors.torch import load_file

STEPS = 3
"""Of the finished run; the killed one did all but the last."""
TRAIN = (
    "data.train_problems=32",
    "adapter.r=2",
    "checkpoint.every=1",
    f"checkpoint.keep={STEPS}",
    *SMALL,
    f"steps={STEPS}",
)
OUT = ("data.eval_problems=2", "out=out")
COMMANDS = (
    ("eval", "run=run", *OUT),
    ("eval", "run=run/checkpoints/step-2", *OUT),
    ("export", "run=run", "format=adapter", "out=out"),
    ("export", "run=run", "format=merged", "out=out"),
    ("export", "run=run/checkpoints/step-1", "format=adapter", "out=out"),
    ("train", "resume=run"),
    ("train", "resume=run", f"steps={STEPS + 1}"),
    ("train", *TRAIN, "run_dir=run", "resume=auto"),
    ("sample", "run=run", "text=1+1="),
    ("compare", "run=run", "other=base", "out=out"),
    ("report", "run=run", "out=out"),
    ("report", "sweep=.", "out=out"),
    ("runs", "folder=."),
)


def prepare(root: Path, server: Server) -> Path:
    """A folder with the run `finished`, the run `killed`, and the `key` that signs both."""
    result = run(Case(("train", *TRAIN, "run_dir=run"), named=("run",)), root / "made", server)
    assert result.status == 0 and problems(result) == [], (result.err, problems(result))
    base = root / "prepared"
    for name in ("finished", "killed"):
        shutil.copytree(result.work / "run", base / name)
    for name in ("summary.json", "masked_tokens.json"):
        (base / "killed" / name).unlink()
    for name in ("adapter", f"checkpoints/step-{STEPS}"):
        shutil.rmtree(base / "killed" / name)
    metrics = base / "killed/metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(lines[: STEPS - 1]), encoding="utf-8")
    shutil.copyfile(root / "made/config/dppo/key", base / "key")
    return base


def case(seed: int, prepared: Path) -> Case:
    """A command on a run with one or two damages, the user's own run or somebody else's."""
    random = Random(seed)
    kind = random.choice(("finished", "killed"))
    steps = tuple(range(1, STEPS + (kind == "finished")))
    broken = tuple(damage.draw(random, steps) for _ in range(random.choice((1, 1, 1, 2))))
    own, trusts = random.random() < 0.7, random.random() < 0.1
    return Case(
        (*random.choice(COMMANDS), *(["trust=true"] if trusts else [])),
        functools.partial(_arrange, prepared / kind, prepared / "key" if own else None, broken),
        about=f"run {seed}: {kind}, {'own' if own else 'foreign'}, {'; '.join(map(str, broken))}",
        named=("run", "out"),
        may_run_canary=trusts,
        detail=(kind, broken),
    )


def _arrange(run: Path, key: Path | None, broken: Sequence[Damage], work: Path) -> None:
    shutil.copytree(run, work / "run")
    if key is not None:
        (work.parent / "config/dppo").mkdir()
        shutil.copyfile(key, work.parent / "config/dppo/key")
    for one in broken:
        one.do(work / "run")


def wrong(result: Result, prepared: Path) -> Iterator[str]:
    """What a command that went well got wrong, and what one that did not has destroyed."""
    kind, broken = result.case.detail
    command, *words = result.case.words
    if result.status != 0:
        for path in result.changed:
            if command != "train" or (kind == "finished" and path in ("work/run/summary.json", "work/run/adapter")):
                yield f"status {result.status}, but changed {path!r}"
        return
    if any(_is_unnoticeable(one) for one in broken):
        return
    if command == "export" and "format=adapter" in words:
        found, of_the_run = weights(result.work / "out"), weights(prepared / "finished/adapter")
        if found not in {weights(path.parent) for path in (prepared / "finished").rglob(WEIGHTS)}:
            yield "exported an adapter that the run never had"
        elif (
            kind == "finished"
            and "run=run" in words
            and found != of_the_run
            and (result.work / "run/summary.json").is_file()
        ):
            yield "exported an older adapter of a finished run"
    if command == "train" and kind == "killed" and f"steps={STEPS + 1}" not in words:  # noqa: SIM102
        if weights(result.work / "run/adapter") != weights(prepared / "finished/adapter"):
            yield "went on to another adapter than the undisturbed run"


def _is_unnoticeable(one: Damage) -> bool:
    """Whether it makes another run of it, complete and consistent."""
    return one.path == "config.yaml" or one.kind in ("edit_manifest", "copy", "swap") or True in one.how


def weights(folder: Path) -> str:
    """A hash of what an adapter holds, however its file is laid out."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
