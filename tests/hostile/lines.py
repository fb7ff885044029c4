"""Command lines that nobody types on purpose, drawn from the real YAML tree and the odd words of words.json.

Values that would be a valid long run are not drawn: sizes are small, invalid, or so large that no machine has them.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml
from cases import SMALL, Case

from dppo_cli.config.conf_tree import config_dir, groups, groups_of

ODD: dict[str, list[Any]] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
LONG = ("x" * 5000, "9" * 5000, "x" * 256, "a/" * 2000 + "a", "[" + ",".join("1" * 3000) + "]", "${" * 500)
"""Words that words.json is too short for."""
SIZES = {
    "steps": ("1", "2"),
    "batch.prompts_per_step": ("4", "8"),
    "batch.samples_per_prompt": ("2", "3", "8"),
    "batch.prompts_per_update": ("1", "2", "4"),
    "batch.epochs": ("1", "2"),
    "data.train_problems": ("1", "16"),
    "data.eval_problems": ("1", "3"),
    "sampling.max_new_tokens": ("1", "6"),
    "eval.samples_per_prompt": ("1", "2"),
    "eval.every": ("0", "1"),
    "samples_per_prompt": ("1", "3"),
    "adapter.r": ("1", "7"),
    "approx.k": ("1", "5", "50"),
    "rollout.concurrent_sequences": ("1", "3", "512"),
    "rollout.max_logprobs": ("1", "64", "4096"),
    "hardware.tokens_per_micro_batch": ("1", "17", "4096"),
    "hardware.head_chunk": ("1", "5", "512"),
    "reward.workers": ("1", "2"),
    "reward.max_failures": ("1", "3"),
    "checkpoint.every": ("0", "1"),
    "checkpoint.keep": ("1", "2"),
    "optim.warmup_updates": ("0", "3"),
    "samples": ("1", "2"),
    "rows": ("0", "1", "3"),
    "check": ("0", "1", "3"),
    "problems": ("1", "2"),
    "prompt_tokens": ("1", "50"),
    "shown": ("0", "1", "3"),
    "limit": ("1", "3"),
}
"""Keys that say how much is done, with values that take no time."""
ONLY_LONG = ("steps", "rows", "check", "problems", "shown", "limit")
"""Large values of these are no mistake."""
PATH_KEYS = (
    "data.path",
    "data.eval_path",
    "reward.path",
    "model.path",
    "adapter.path",
    "run_dir",
    "out",
    "run",
    "other",
    "sweep",
    "folder",
    "resume",
)
ELSEWHERE = {choice for choice in groups()["model"] if choice not in ("hf", "arithmetic_1m", "long_tail_2k")} | {
    "gpu_24gb"
}
"""Choices that need the hub or a GPU, of which the keys are those of other choices."""
WRITTEN = ("run_dir", "out")
"""Keys that name a new folder or file, which is then the user's wish."""
COMMANDS = {
    "train": 60,
    "eval": 20,
    "export": 10,
    "data": 5,
    "sample": 5,
    "report": 5,
    "compare": 5,
    "runs": 5,
    "plan": 1,
}
"""How often each is drawn; `plan` takes seconds. `doctor` asks the hub."""
WAITS = ("serve",)
"""Keys that have a command go on until it is told to end."""
NEEDED = {
    "data=file": "data.path=problems.jsonl",
    "reward=function": "reward.path=canary.py:f",
    "model=hf": "model.path=embedded:arithmetic_1m",
}
"""Choices with a key that has no default."""
DPPO = "_target_: dppo_cli.algorithm.objective.DPPO\n"
CALLBACK = "{a: {_target_: canary.Mine}}"


def line(seed: int, prepared: Path) -> Case:
    """A command line, the same for the same seed. `prepared`: has the run `finished`."""
    random = Random(seed)
    command = random.choices(tuple(COMMANDS), tuple(COMMANDS.values()))[0]
    drawn = [word for _ in range(random.choices((1, 2, 3), (7, 2, 1))[0]) for word in _words(random, command)]
    if random.random() < 0.02:
        drawn.append(random.choice(drawn))
    sweep = ["-m", "seed=1,2"] if random.random() < 0.03 and command in ("train", "eval") else []
    words = [command, *_beginning(random, command, drawn), *sweep, *drawn]
    text = " ".join(words)
    return Case(
        tuple(words),
        functools.partial(_arrange, prepared / "finished" if "prepared" in text else None),
        about=f"line {seed}",
        environment=random.choice(ODD["environment"]) if random.random() < 0.06 else {},
        named=("prepared", "out", *(["*"] if any(word.lstrip("+").startswith(WRITTEN) for word in drawn) else [])),
        may_run_canary="canary" in text,
    )


def _words(random: Random, command: str) -> Sequence[str]:
    """One or two words: a key with a value, an option, or something loose."""
    kind = random.choices(("right", "odd", "loose", "option", "choice", "prefixed"), (14, 5, 2, 1, 2, 1))[0]
    if kind == "loose":
        return [random.choice(ODD["loose"])]
    if kind == "option":
        return list(random.choice(ODD["options"]))
    if kind == "choice" and groups_of(command):
        group = random.choice(groups_of(command))
        return [f"{group}={random.choice(['nope', 'null', *groups()[group] * 3, *ODD['nested']])}"]
    key, choice, default = random.choice(_leaves(command))
    if choice and random.random() < 0.1:
        key, default = f"{choice.partition('=')[0]}._target_", ""
    chosen = [choice] if choice and (kind == "right" or random.random() < 0.9) else []
    prefix = random.choice(("+", "++", "~")) if kind == "prefixed" else ""
    value = _right(random, key, default) if kind != "odd" else _odd(random)
    # A folder that is to be written stays within reach.
    return [*chosen, f"{prefix}{key}={value.replace('/dev/zero:', 'zero:') if key in WRITTEN else value}"]


def _right(random: Random, key: str, default: Any) -> str:
    """A value of the right kind."""
    if key in SIZES:
        kinds: list[Sequence[str]] = [SIZES[key]] * 5 + [ODD["no_sizes"]]
        kinds += [] if key in ONLY_LONG else [ODD["too_many"]]
    elif key.endswith("_target_"):
        kinds = [ODD["targets"]]
    elif key in PATH_KEYS:
        kinds = [ODD["paths"]]
    elif isinstance(default, bool):
        kinds = [("true", "false")]
    elif isinstance(default, int | float):
        kinds = [ODD["floats"]] * 4 + [ODD["no_sizes"]]
    else:
        kinds = [ODD["plausible"]] * 4 + [ODD["floats"]]
    value: str = random.choice(random.choice(kinds))
    return value


def _odd(random: Random) -> str:
    kind = random.choice(("words", "nested", "interpolations", "functions", "paths", "long", "text"))
    if kind == "text":
        points = [
            random.randrange(1, random.choice((128, 256, 0x3000, 0x110000))) for _ in range(random.randrange(1, 12))
        ]
        return "".join(map(chr, points))
    value: str = random.choice(LONG if kind == "long" else ODD[kind])
    return value


def _beginning(random: Random, command: str, drawn: Sequence[str]) -> list[str]:
    """Words that make a command small; what was drawn stands after them."""
    keys = {word.partition("=")[0].lstrip("+~") for word in drawn}
    given = [word for choice, word in NEEDED.items() if choice in drawn and word.partition("=")[0] not in keys]
    if command in ("train", "plan", "data"):
        return [*([] if "data=file" in drawn else ["data.train_problems=32"]), *SMALL, *given]
    if command == "runs":
        return ["folder=."]
    if command == "sample":
        return ["run=prepared", "text=1+1=", *given]
    if command == "compare":
        return ["run=prepared", f"other={random.choice(('prepared', 'base'))}", "out=out", *given]
    if command in ("export", "report"):
        return ["run=prepared", "out=out", *given]
    data = [] if "data=file" in drawn else ["data=arithmetic"]
    of = ["run=prepared"] if random.random() < 0.5 else ["model.path=embedded:arithmetic_1m", *data]
    return [*of, "data.eval_problems=2", *given]


@functools.cache
def _leaves(command: str) -> tuple[tuple[str, str, Any], ...]:
    """Every key that holds a value, the word that chooses the YAML file which has it ("": none), and its default."""
    own = yaml.safe_load((config_dir() / f"{command}.yaml").read_text(encoding="utf-8"))
    found = [(key, "", default) for key, default in _flat(own) if key not in groups()]
    for group in groups_of(command):
        for choice in sorted({*groups()[group]} - ELSEWHERE):
            text = (config_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8")
            node = yaml.safe_load(text) or {}
            found += [
                (key, f"{group}={choice}", default)
                for key, default in _flat(node if "@package _global_" in text else {group: node})
            ]
    return tuple(found)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in node.items():
        if isinstance(child, dict) and child:
            yield from _flat(child, f"{prefix}{name}.")
        elif name not in ("defaults", "_target_", *WAITS):
            yield f"{prefix}{name}", child


def _arrange(run: Path | None, work: Path) -> None:
    """Odd things for paths to point at."""
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(12)]
    (work / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / "folder").mkdir()
    (work / "empty").write_bytes(b"")
    (work / "binary").write_bytes(bytes(range(256)) * 4)
    os.mkfifo(work / "fifo")
    (work / "loop").symlink_to("loop")
    (work / "nowhere").symlink_to("not/there")
    for name, config in (("broken_model", "{"), ("empty_model", "{}")):
        (work / name).mkdir()
        for file, text in (("config.json", config), ("model.safetensors", "x"), ("tokenizer.json", config)):
            (work / name / file).write_text(text, encoding="utf-8")
    confs = work / "confs"
    for name, text in {
        "objective/mine": f"{DPPO}ratio_cap: 2.0\n",
        "objective/canary": "_target_: canary.Mine\n",
        "objective/empty": "",
        "objective/list": "[1, 2]\n",
        "objective/deep": f"{DPPO}ratio_cap: {'[' * 300}{']' * 300}\n",
        "objective/hydra": f"# @package _global_\nhydra: {{callbacks: {CALLBACK}}}\nobjective:\n  {DPPO}",
        "anything/callbacks": f"# @package hydra\ncallbacks: {CALLBACK}\n",
    }.items():
        (confs / name).parent.mkdir(parents=True, exist_ok=True)
        (confs / f"{name}.yaml").write_text(text, encoding="utf-8")
    (confs / "objective/binary.yaml").write_bytes(bytes(range(256)))
    if run is not None:
        shutil.copytree(run, work / "prepared")
