"""`dppo compare`: two runs, or a run and its base model, on the same held-out problems."""

import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands import evaluate
from dppo_cli.commands.schemas import CompareConfig, EvalConfig
from dppo_cli.commands.trained import find_trained
from dppo_cli.config.checks import visible
from dppo_cli.config.saved import as_written
from dppo_cli.errors import ConfigError, DataError, RunError
from dppo_cli.telemetry.table import (
    RichConsole,
    percent,
    points,
    print_table,
    print_to_stderr,
    print_warning,
    with_interval,
)
from dppo_cli.training.evaluation import EvalResult
from dppo_cli.training.files import write_json, write_text
from dppo_cli.training.intervals import paired_difference
from dppo_cli.training.run_folder import check_free, default_run_dir
from dppo_cli.types import Group

BASE = "base"
"""In place of the other run: the model of the first without its adapter."""
SOLVED = 0.5
"""Share of a problem's judged samples that are right from which on it counts as solved."""
LONGEST = 300
"""Characters of a prompt or an answer that are shown; changed.jsonl has all of them."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build, with one of `dppo eval` for each side.

    What the user leaves open is the first run's: problems, reward, and how is sampled. Prompts are each run's own, as
    are rollout and hardware. Raises ConfigError unless there are two runs, RunError if one cannot be used.
    """
    given: Any = OmegaConf.to_container(node)
    runs = (given["run"], given["other"])
    if None in runs:
        raise ConfigError(
            "name two runs: run=runs/one other=runs/two, or other=base for the first one's model, untrained"
        )
    if runs[0] == BASE:
        raise ConfigError(f"run={BASE}: the base model is that of the run; write run=RUN other={BASE}")
    n = node.samples_per_prompt
    if not isinstance(n, int):
        raise ConfigError(f"samples_per_prompt={n} is not a whole number")
    pass_k = [2**i for i in range(n.bit_length()) if 2**i <= n] or [1]
    own = {key: value for key, value in given.items() if key not in ("other", "shown", "json")}
    nothing = dict.fromkeys(("template", "system", "template_kwargs", "too_long"))
    model = dict.fromkeys(("path", "revision", "gguf_file"))
    own |= {"checkpoint": "last", "prompt": nothing, "pass_k": pass_k, "out": None, "model": model}
    first: Any = evaluate.prepare(OmegaConf.create(own), typed)
    if runs[1] == BASE:
        second = OmegaConf.merge(first, {"run": None, "adapter": None})
    else:
        settings = {name: first[name] for name in ("data", "reward", "environment", "sampling", "success_reward")}
        with _of_the_other():
            second = evaluate.prepare(OmegaConf.create({**own, **settings, "run": runs[1]}), typed)
    kept = {key: given[key] for key in ("run", "other", "shown", "out", "json")}
    return OmegaConf.create({"first": first, "second": second, **kept})


@contextmanager
def _of_the_other() -> Iterator[None]:
    """What is wrong with the second run is said of `other`, as the user has typed it."""
    try:
        yield
    except RunError as error:
        raise RunError(re.sub(r"^run=", "other=", str(error))) from None


def run_compare(config: CompareConfig, config_yaml: str) -> dict[str, Any]:
    """`dppo compare`: writes summary.json and changed.jsonl, prints tables or JSON, returns the summary."""
    started = time.perf_counter()
    warn = print_to_stderr if config.json else print_warning
    sides = (config.first, config.second)
    # Both, before the first is sampled: that may take long.
    adapters: list[Path | None] = []
    for side in sides:
        with _of_the_other() if adapters else nullcontext():
            adapters.append(None if side.run is None else find_trained(side.run, warn).adapter)
    out = Path(config.out) if config.out else default_run_dir("comparisons")
    check_free(out, "out")
    results = [_measured(*each, warn) for each in zip(sides, adapters, strict=True)]
    first, second = _same_problems(results[0], results[1], warn)
    difference = paired_difference(second.rates, first.rates)
    rows = changed(first, second)
    summary: dict[str, Any] = {
        "run": config.run,
        "other": config.other,
        "first": first.figures(config.first.pass_k),
        "second": second.figures(config.second.pass_k),
        "difference": None if difference is None else asdict(difference),
        "only_first": sum(row["solved_by"] == "first" for row in rows),
        "only_second": sum(row["solved_by"] == "second" for row in rows),
        "samples_per_prompt": config.first.samples_per_prompt,
        "sampling": asdict(config.first.sampling),
        "seed": config.first.seed,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", config_yaml)
        write_text(out / "changed.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        # What comes from the environment goes into no file.
        kept = {key: as_written(config_yaml, key, str(summary[key])) for key in ("run", "other", "out")}
        write_json(out / "summary.json", {**summary, **kept})
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {error.strerror}") from None
    if config.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        _print(config, first, second, summary)
        _show((config.run, config.other), rows[: config.shown])
    return summary


def changed(first: EvalResult, second: EvalResult) -> list[dict[str, Any]]:
    """The problems that only one of the two solves."""
    rows = []
    for a, b, rate_a, rate_b in zip(first.groups, second.groups, first.rates, second.rates, strict=True):
        if rate_a is not None and rate_b is not None and (rate_a >= SOLVED) != (rate_b >= SOLVED):
            rows.append(
                {
                    "problem": a.prompt.index,
                    "solved_by": "first" if rate_a > rate_b else "second",
                    "prompt": a.prompt.example.prompt,
                    "answer": a.prompt.example.answer,
                    "first": {"right": rate_a, "completions": [c.text for c in a.completions]},
                    "second": {"right": rate_b, "completions": [c.text for c in b.completions]},
                }
            )
    return rows


def _measured(side: EvalConfig, adapter: Path | None, warn: Callable[[str], None]) -> EvalResult:
    result = evaluate.measure(side, adapter, warn)
    gc.collect()  # The parts of a policy know each other; the next one needs its memory.
    return result


def _same_problems(first: EvalResult, second: EvalResult, warn: Callable[[str], None]) -> tuple[EvalResult, EvalResult]:
    """Both with the problems that both have: one that is too long for either model is left out of both.

    Raises DataError if a problem is not the same for both.
    """
    sides: list[dict[int, Group]] = [{g.prompt.index: g for g in result.groups} for result in (first, second)]
    common = [index for index in sides[0] if index in sides[1]]
    for index in common:
        if sides[0][index].prompt.example != sides[1][index].prompt.example:
            raise DataError(f"problem {index} was not the same for both runs: the data changed in between")
    if (alone := len(sides[0]) + len(sides[1]) - 2 * len(common)) > 0:
        warn(f"{alone} problems are too long for one of the two and are left out")
    kept = ([side[index] for index in common] for side in sides)
    return EvalResult(next(kept), first.success_reward), EvalResult(next(kept), second.success_reward)


def _print(config: CompareConfig, first: EvalResult, second: EvalResult, summary: dict[str, Any]) -> None:
    sides = (summary["first"], summary["second"])
    rows = [
        ("", config.run, config.other),
        ("accuracy", *(with_interval(r.accuracy, r.interval()) for r in (first, second))),
    ]
    for k in config.first.pass_k[1:]:
        rows.append((f"pass@{k}", *(percent(side["pass_at"][str(k)]) for side in sides)))
    rows.append(("solved by it alone", str(summary["only_first"]), str(summary["only_second"])))
    print_table("compare", rows)
    found = summary["difference"]
    print_table(
        f"{config.run} - {config.other}",
        [
            ("difference", "not measured" if found is None else points(found["mean"], found["interval"])),
            ("problems x samples", f"{len(first.groups)} x {config.first.samples_per_prompt}"),
            ("written to", summary["out"]),
        ],
    )


def _show(runs: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """The first sample of each side, of some problems."""
    console = RichConsole(highlight=False, soft_wrap=True)

    def say(label: str, text: Any) -> None:
        line = visible(str(text))
        console.print(f"  {label}: {line if len(line) <= LONGEST else line[:LONGEST] + '...'}", markup=False)

    for row in rows:
        label = visible(dict(zip(("first", "second"), runs, strict=True))[row["solved_by"]])
        answer = visible(str(row["answer"]))
        console.print(f"only {label} solves problem {row['problem']}, answer {answer}", markup=False)
        say("prompt", row["prompt"])
        for run, side in zip(runs, ("first", "second"), strict=True):
            say(visible(run), row[side]["completions"][0])
