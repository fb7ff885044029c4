"""Ways to break a run folder, each as data, so that it can be shown, repeated and put together."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
REMOVED = "removed"
"""The value that takes a key away."""
# fmt: off
OF_A_RUN = ("config.yaml", "metrics.jsonl", "summary.json", "masked_tokens.json", "resumes.json", ".lock", "adapter",
    "adapter/adapter_config.json", f"adapter/{WEIGHTS}", "adapter/README.md", "checkpoints", "eval_before.json",
    "masked_by_mu.json", "warnings.jsonl", "samples", "samples/step-1.jsonl")
OF_A_CHECKPOINT = (".", "adapter", "adapter/adapter_config.json", f"adapter/{WEIGHTS}", "adapter/README.md",
    "manifest.json", "state.json", "state.safetensors")
VALUES = (REMOVED, REMOVED, REMOVED, None, True, -1, 0, 1, 2, 3, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "a\nb", "1", [], [[]], [1], [None, 1], {}, {"a": 1}, "${seed}", "${oc.env:HOME}", "../..", "/dev/zero",
    "\ud800", "[/x]")
CLASSES = ("canary.Mine", "canary.f", "os.system", "dppo_cli.algorithm.objective.PolicyGradient", "..", "",
    "dppo_cli.reward.function.Function", "dppo_cli.config.sections.LoRA", "dppo_cli.embedded.pretrain.x")
TEXTS = ("", "\n", "null", "[]", "{}", "1", '"x"', "true", "[[[[", "NaN", "\ufeff{}", "\0", "a: b: c", "- 1\n- 2",
    "[" * 100_000, "{" * 3000, '{"a":' * 2000 + "1" + "}" * 2000, "x" * 300_000, "[" + "1," * 300_000 + "1]")
TAILS = (b"\0", b"x", b"\n", b"{}", b"\xff\xfe", b"0" * 10_000)
FUNCTION = ("{_target_: dppo_cli.reward.function.Function, path: 'canary.py:f', timeout: 5, default: null, "
    "max_failures: 1, workers: 1, memory_gib: 4}")
JSON_LINES = ("{_target_: dppo_cli.data.file.File, path: /dev/zero, split: null, eval_path: null, eval_split: null, "
    "prompt_column: a, prompt_template: null, answer_column: b, answer_pattern: null, shuffle: null, "
    "train_problems: null, eval_problems: 1, on_bad_row: refuse}")
YAML_LINES = ("a: &a [x, x]\nb: *a", "seed: 1\nseed: 2", "x: !!python/object/apply:os.system ['touch x']",
    "steps: !!binary aGk=", "<<: {seed: 3}", "objective: {_target_: canary.Mine}", f"reward: {FUNCTION}",
    f"data: {JSON_LINES}", "\t", "---\nseed: 2", "...", "? [1, 2]\n: 3", "1: 2", "null: 1", "'': 1", "é: ü",
    "hydra: {mode: MULTIRUN}", "_target_: canary.Mine", "model: {path: ../.., revision: null}",
    "model: {path: owner/name, revision: null}", "d: " + "{a: " * 40 + "1" + "}" * 40, "# signature: 0",
    "# signature: é", "run_dir: /nonexistent", "run_dir: ../beside", "resume: auto", "trust: true",
    "adapter: {path: ../beside}")
NAMES = ("step-3", "step-03", "step-٣", "step-99999999999999999999", "step--1", "step-", "step-2x", "step-1e3",
    ".step-9.tmp", "x\ny", "\udcff", "step-7\n")
STAND_INS = ("pipe", "folder", "loop", "nothing", "up", "huge", "beside", "/dev/zero", "/dev/null", "/proc/self/mem")
DTYPES = ("float64", "bfloat16", "float16", "int64", "bool", "uint8", "float8_e4m3fn", "complex64")
TENSORS = ("drop", "more", "none", "transposed", "longer", "scalar", "empty", "nan", "inf", "0", "1e38", *DTYPES)
HEADERS: dict[str, dict[str, Any]] = {"offsets": {"data_offsets": [0, 2**60]}, "shape": {"shape": [2**40, 2**40]},
    "negative": {"shape": [-1, 4]}, "dtype": {"dtype": "X99"}, "size": {}}
SWAPS = (("adapter", "checkpoints"), ("adapter", "checkpoints/step-1/adapter"), ("config.yaml", "metrics.jsonl"),
    ("checkpoints/step-2", "checkpoints/step-1"), ("checkpoints/step-1", "checkpoints/step-2"),
    *((f"checkpoints/step-2/{n}", f"checkpoints/step-1/{n}") for n in OF_A_CHECKPOINT[1:]),
    (f"adapter/{WEIGHTS}", "checkpoints/step-1/state.safetensors"), ("metrics.jsonl", "config.yaml"))
# fmt: on


@dataclass(frozen=True)
class Damage:
    """`kind`: a function of this module; `path`: below the run; `how`: its further arguments."""

    kind: str
    path: str
    how: tuple[Any, ...] = ()

    def do(self, run: Path) -> None:
        """Does nothing where an earlier damage took away what it needs, or made it a link to somewhere else."""
        target = run / self.path
        try:
            if target.resolve().is_relative_to(run.resolve()):
                KINDS[self.kind](target, *self.how)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, yaml.YAMLError):
            return

    def __str__(self) -> str:
        return f"{self.kind}({self.path!r}{''.join(f', {ascii(part)[:80]}' for part in self.how)})"


def draw(random: Random, steps: tuple[int, ...]) -> Damage:
    """One damage to a run with checkpoints of these steps."""
    checkpoint = f"checkpoints/step-{random.choice(steps)}"
    files = [*OF_A_RUN, *(f"{checkpoint}/{name}" for name in OF_A_CHECKPOINT)]
    path, place = random.choice(files), random.random()
    jsons = [name for name in files if name.endswith((".json", ".jsonl"))]
    tensors = [name for name in files if name.endswith(".safetensors")]
    value, sealed = random.choice(VALUES), random.random() < 0.7
    # Most of state.json are counts of tokens; what a resume needs is at its ends.
    end = random.choice((0.1 * place, 1 - 0.1 * (1 - place)))
    made = [
        Damage("truncate", path, (place,)),
        Damage("delete", path),
        Damage("flip", path, (place, random.randrange(8))),
        Damage("append", path, (random.choice(TAILS),)),
        Damage("overwrite", path, (random.choice(TEXTS),)),
        *[Damage("replace", path, (random.choice(STAND_INS),))] * 2,
        *[Damage("edit_json", random.choice(jsons), (place, value, sealed))] * 2,
        *[Damage("edit_json", f"{checkpoint}/state.json", (end, value, True))] * 2,
        *[Damage("edit_yaml", "config.yaml", (place, value))] * 2,
        Damage("retarget", "config.yaml", (place, random.choice(CLASSES))),
        Damage("append", "config.yaml", (random.choice(YAML_LINES).encode() + b"\n",)),
        *[Damage("edit_tensors", random.choice(tensors), (place, random.choice(TENSORS), sealed))] * 2,
        Damage("lie", random.choice(tensors), (random.choice(tuple(HEADERS)), sealed)),
        Damage("edit_manifest", f"{checkpoint}/manifest.json", (place, value)),
        Damage("copy", checkpoint, (random.choice(NAMES),)),
        Damage("swap", *_swap(*random.choice(SWAPS))),
        Damage("make", random.choice((".", "checkpoints", "adapter", checkpoint)), (random.choice(NAMES), "folder")),
        Damage("make", "checkpoints", (random.choice(NAMES), random.choice(STAND_INS))),
    ]
    return random.choice(made)


def _swap(path: str, other: str) -> tuple[str, tuple[str]]:
    return path, (os.path.relpath(other, os.path.dirname(path) or "."),)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def flip(path: Path, share: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1 << bit
    path.write_bytes(content)


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def overwrite(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def replace(path: Path, what: str) -> None:
    """By something that is not a file, or not one of a sensible size."""
    if path.exists() or path.is_symlink():
        delete(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        (path / "inner").mkdir(parents=True)
    elif what == "huge":
        path.write_bytes(b"{")
        os.truncate(path, 2**43)
    else:
        root = next(p for p in path.parents if p.name == "work").parent
        links = {"beside": root / "beside/canary.py", "loop": path.name, "nothing": "not/there", "up": ".."}
        path.symlink_to(links.get(what, what))


def edit_json(path: Path, place: float, value: Any, sealed: bool) -> None:
    """Another value at one place of a JSON document, or of the first line of several."""
    text = path.read_text(encoding="utf-8")
    first, *rest = text.splitlines() if path.suffix == ".jsonl" else [text]
    node = json.loads(first)
    _edit(node, place, value)
    path.write_text("\n".join([json.dumps(node), *rest]) + "\n", encoding="utf-8")
    if sealed:
        seal(path)


def edit_yaml(path: Path, place: float, value: Any) -> None:
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    _edit(node, place, value)
    path.write_text(yaml.safe_dump(node), encoding="utf-8")


def retarget(path: Path, place: float, name: str) -> None:
    """Have one of a config's `_target_` name something else."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [i for i, line in enumerate(lines) if "_target_" in line]
    chosen = found[int(len(found) * place)]
    lines[chosen] = lines[chosen].partition("_target_")[0] + f"_target_: {json.dumps(name)}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_tensors(path: Path, place: float, how: str, sealed: bool) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[int(len(tensors) * place)]
    tensor = tensors.pop(name)
    if how in DTYPES:
        tensors[name] = tensor.to(getattr(torch, how))
    elif how == "more":
        tensors |= {name: tensor, "unknown": tensor.clone()}
    elif how == "none":
        tensors = {}
    elif how != "drop":
        shapes = {
            "transposed": tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor,
            "longer": torch.cat([tensor, tensor]),
            "empty": tensor[:0],
        }
        single = {"scalar": torch.tensor(1.0)}
        tensors[name] = (
            {**shapes, **single}[how] if how in {**shapes, **single} else torch.full_like(tensor, float(how))
        )
    save_file(tensors, path)
    if sealed:
        seal(path)


def lie(path: Path, how: str, sealed: bool) -> None:
    """In the header of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    named = json.loads(content[8 : 8 + size])
    named[next(name for name in named if name != "__metadata__")] |= HEADERS[how]
    text = json.dumps(named).encode()
    length = 2**62 if how == "size" else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])
    if sealed:
        seal(path)


def edit_manifest(path: Path, place: float, value: Any) -> None:
    """A manifest that says something else, with the right hash of itself."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    _edit(manifest, place, value)
    _write_manifest(path, manifest)


def copy(path: Path, name: str) -> None:
    """A second checkpoint with the content of another, under an odd name."""
    shutil.copytree(path, path.parent / name, symlinks=True, copy_function=_copy_file)


def _copy_file(source: str, target: str) -> None:
    """Without writing out a hole of terabytes or an endless device, which would fill the disk for the other cases."""
    size = os.lstat(source).st_size
    if size < 2**40:
        shutil.copyfile(source, target, follow_symlinks=False)
    else:
        Path(target).touch()
        os.truncate(target, size)


def swap(path: Path, other: str) -> None:
    """The content of another file or folder of the run."""
    source = path.parent / other
    spare = path.parent.parent / "spare"
    if source.is_dir():
        shutil.copytree(source, spare, symlinks=True, copy_function=_copy_file)
    else:
        _copy_file(str(source), str(spare))
    delete(path)
    spare.rename(path)


def make(path: Path, name: str, what: str) -> None:
    """Something more beside the run's own files."""
    replace(path / name, what)


def seal(path: Path) -> None:
    """Make the manifest of the checkpoint that a file is in, if it is in one, fit it."""
    for folder in path.parents:
        if (folder / "manifest.json").is_file() and folder.parent.name == "checkpoints":
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            manifest["files"][str(path.relative_to(folder))] = {"bytes": len(content), "sha256": digest}
            _write_manifest(folder / "manifest.json", manifest)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": digest}), encoding="utf-8")


def _edit(node: Any, place: float, value: Any) -> None:
    spots = list(_spots(node))
    parent, key = spots[int(len(spots) * place)]
    if value == REMOVED:
        del parent[key]
    else:
        parent[key] = value


def _spots(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(pairs):
        yield node, key
        yield from _spots(child)


KINDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (truncate, delete, flip, append, overwrite, replace, edit_json, edit_yaml, retarget, edit_tensors)
}
KINDS |= {function.__name__: function for function in (lie, edit_manifest, copy, swap, make)}
