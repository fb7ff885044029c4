"""`dppo data`: the problems of a run as the model and the reward see them, before anything is trained."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from dppo_cli.commands.assembly import in_turns
from dppo_cli.commands.planning.shapes import read_source
from dppo_cli.commands.problems import prompting_with, read_problems
from dppo_cli.commands.schemas import DataConfig
from dppo_cli.config.checks import visible
from dppo_cli.data.examples import content
from dppo_cli.environment.environment import Environment
from dppo_cli.errors import ConfigError, ModelError, RunError
from dppo_cli.policy.encoder import Encoder
from dppo_cli.policy.loading import load_policy
from dppo_cli.reward.scorer import Scorer
from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.table import RichConsole, percent, print_table, print_warning
from dppo_cli.training.evaluation import evaluate
from dppo_cli.types import Completion, Example, PolicyReport, Prompt, Status

BINS = 10
BAR = 40
"""Characters of the longest bar of a histogram."""
AT_ONCE = 64
"""Problems whose difficulty is measured between two lines of progress."""
FORMS = {
    "the answer": "{}",
    "in a sentence": "The answer is {}.",
    "after ####": "#### {}",
    "in \\boxed{}": "The answer is $\\boxed{{{}}}$.",
    "in <answer> tags": "<answer>{}</answer>",
}
"""Right answers in the forms in which rewards look for them."""


def run_data(config: DataConfig, config_yaml: str) -> dict[str, Any]:
    """Print tables, or JSON, and return what JSON holds."""
    if config.out is not None and os.path.lexists(config.out):
        raise ConfigError(f"out={config.out} exists; name a new file")
    told: list[str] = []
    train, sets = read_problems(config, told.append)
    encoder = _encoder(config)
    environment = config.environment.load(told.append)
    prompting = prompting_with(environment, config.prompt, encoder)
    prompts = {"train": encoder.encode(train, prompting)}
    prompts |= {name: encoder.encode(examples, prompting) for name, examples in sets.items()}
    report: dict[str, Any] = {
        "sets": {name: _lengths(of, encoder, config.sampling.max_new_tokens) for name, of in prompts.items()},
        "duplicates": len(train) - len(set(map(content, train))),
        "rows": [_row(prompt, encoder) for prompt in prompts["train"][: config.rows]],
        "reward": None,
        "difficulty": None,
    }
    scorer = None
    if config.check or config.difficulty:
        with phase("loading the reward"):
            scorer = config.reward.load(told.append)
    if scorer is not None and config.check:
        report["reward"] = try_reward(scorer, prompts["train"], encoder, config)
    if scorer is not None and config.difficulty:
        report["difficulty"] = measure_difficulty(config, prompts["train"], scorer, environment)
    report["warnings"] = told + _doubts(report, config)
    if config.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        show(report)
    return report


def _encoder(config: DataConfig) -> Encoder:
    """Without the model's weights."""
    source = read_source(config.model)
    if source.tokenizer is None:
        raise ModelError(f"the tokenizer of {source.path} cannot be had; without it nothing is known of its tokens")
    return Encoder(source.tokenizer, source.path, getattr(source.config, "max_position_embeddings", None))


def _lengths(prompts: Sequence[Prompt], encoder: Encoder, max_new_tokens: int) -> dict[str, Any]:
    """Tokens of the prompts of one set."""
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    limit = encoder.positions
    width = max(1, -(-(lengths[-1] - lengths[0] + 1) // BINS))
    bins = Counter((length - lengths[0]) // width for length in lengths)
    return {
        "problems": len(lengths),
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "p99": lengths[min(len(lengths) - 1, 99 * len(lengths) // 100)],
        "longest": lengths[-1],
        "too_long": 0 if limit is None else sum(length + max_new_tokens > limit for length in lengths),
        "positions": limit,
        "histogram": [
            [lengths[0] + i * width, lengths[0] + (i + 1) * width - 1, bins[i]] for i in range(max(bins) + 1)
        ],
    }


def _row(prompt: Prompt, encoder: Encoder) -> dict[str, Any]:
    example = prompt.example
    shown = (example.prompt, example.answer)
    return {
        "problem": prompt.index,
        "prompt": str(encoder.tokenizer.decode(list(prompt.token_ids))),
        "tokens": len(prompt.token_ids),
        "answer": example.answer,
        "columns": {name: repr(value)[:200] for name, value in example.columns.items() if value not in shown},
    }


def try_reward(scorer: Scorer, prompts: Sequence[Prompt], encoder: Encoder, config: DataConfig) -> list[dict[str, Any]]:
    """What the reward gives right answers in several forms, and wrong ones: mean, and share that counts as right."""
    some = prompts[: config.check]
    answers = [prompt.example.answer for prompt in some]
    others = [next((b for b in (*answers[i:], *answers) if b != a), "") for i, a in enumerate(answers)]
    texts = {name: [form.format(answer) for answer in answers] for name, form in FORMS.items()}
    texts |= {"another problem's answer": others, "nothing": [""] * len(some)}
    found = []
    for name, responses in texts.items():
        completions = [[_completion(text, encoder)] for text in responses]
        values = [row[0].value for row in scorer(some, completions)]
        judged = [value for value in values if value is not None]
        found.append(
            {
                "response": name,
                "right": name in FORMS,
                "example": responses[0],
                "reward": mean(judged) if judged else None,
                "success": mean(v >= config.eval.success_reward for v in judged) if judged else None,
                "judged": len(judged),
            }
        )
    return found


def _completion(text: str, encoder: Encoder) -> Completion:
    """As if the model had written it; its log-probs are of nobody."""
    ids = torch.tensor(encoder.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    sampled = torch.ones_like(ids, dtype=torch.bool)
    return Completion(ids, sampled, PolicyReport(torch.zeros(len(ids))), text, Status.FINISHED, versions=(0,))


def measure_difficulty(
    config: DataConfig, prompts: list[Prompt], scorer: Scorer, environment: Environment | None
) -> dict[str, Any]:
    """How often the model solves each problem; writes those that are kept. Raises RunError if it cannot."""
    with phase("loading the model"):
        policy = load_policy(
            config.model, config.hardware, warn=print_warning, adapter=config.adapter, seed=config.seed
        )
    fitting = policy.encoder.fitting(prompts, config.sampling.max_new_tokens, config.prompt.too_long, print_warning)
    chosen = fitting[: config.problems]
    n = config.batch.samples_per_prompt
    rates: list[float | None] = []
    prompting = prompting_with(environment, config.prompt, policy.encoder)
    with in_turns(config.rollout.load(policy, print_warning), environment, policy, prompting) as engine:
        engine.sync(version=0)
        for start in range(0, len(chosen), AT_ONCE):
            part = chosen[start : start + AT_ONCE]
            seed = config.seed + start
            rates += evaluate(engine, part, scorer, config.sampling, n, config.eval.success_reward, seed).rates
            if not config.json:
                print(f"{len(rates)} of {len(chosen)} problems", flush=True)
    low, high = config.keep
    kept = [
        (p.example, rate) for p, rate in zip(chosen, rates, strict=True) if rate is not None and low <= rate <= high
    ]
    if config.out is not None:
        _write(Path(config.out), kept)
    judged = [rate for rate in rates if rate is not None]
    tenths = Counter(min(int(rate * BINS), BINS - 1) for rate in judged)
    return {
        "problems": len(chosen),
        "samples_per_prompt": n,
        "solve_rate": mean(judged) if judged else None,
        "never": sum(rate == 0 for rate in judged),
        "always": sum(rate == 1 for rate in judged),
        "histogram": [[i / BINS, (i + 1) / BINS, tenths[i]] for i in range(BINS)],
        "kept": len(kept),
        "out": config.out,
    }


def _write(path: Path, kept: Sequence[tuple[Example, float]]) -> None:
    rows = (
        {**e.columns, "prompt": list(map(dict, e.messages)) or e.prompt, "answer": e.answer, "solve_rate": rate}
        for e, rate in kept
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise RunError(f"out={path} cannot be written: {error.strerror}") from None


def _doubts(report: Mapping[str, Any], config: DataConfig) -> list[str]:
    """What looks wrong."""
    found = []
    tried = report["reward"] or []
    if tried and not any(row["right"] and row["success"] for row in tried):
        found.append(
            f"no form of the right answer gets a reward of eval.success_reward={config.eval.success_reward:g}: the "
            "reward expects another form, or the answers are not what it compares with"
        )
    wrong = [row["response"] for row in tried if not row["right"] and row["success"]]
    if wrong:
        found.append(f"a wrong response counts as right: {', '.join(wrong)}")
    for name, of in report["sets"].items():
        if of["too_long"]:
            found.append(
                f"{of['too_long']} problems of {name} do not fit into the {of['positions']} positions of the model "
                f"together with sampling.max_new_tokens={config.sampling.max_new_tokens}"
            )
    return found


def show(report: Mapping[str, Any]) -> None:
    """The report as tables."""
    console = RichConsole(highlight=False)
    table = Table("set", "problems", "shortest", "median", "99%", "longest", "too long", title="tokens of the prompts")
    for name, of in report["sets"].items():
        keys = ("problems", "shortest", "median", "p99", "longest", "too_long")
        table.add_row(escape(name), *(f"{of[key]:,}" for key in keys))
    console.print(table)
    _bars("tokens, train", [(f"{low} to {high}", n) for low, high, n in report["sets"]["train"]["histogram"]], console)
    if report["duplicates"]:
        console.print(f"{report['duplicates']:,} training problems are repeats of another")
    for row in report["rows"]:
        columns = [(escape(visible(name)), visible(value)) for name, value in row["columns"].items()]
        print_table(
            f"problem {row['problem']}, {row['tokens']} tokens",
            [
                ("as the model gets it", visible(row["prompt"], keep="\n")),
                ("answer", visible(row["answer"])),
                *columns,
            ],
            console,
        )
    if report["reward"] is not None:
        table = Table("response", "for example", "reward", "counts as right", title="what the reward gives")
        for row in report["reward"]:
            reward = "not judged" if row["reward"] is None else f"{row['reward']:.3f}"
            shown = visible(row["example"])
            cells = (row["response"], shown if len(shown) < 60 else shown[:57] + "...", reward, percent(row["success"]))
            table.add_row(*map(escape, cells))
        console.print(table)
    if (found := report["difficulty"]) is not None:
        bars = [(f"{low:.0%} to {high:.0%}", n) for low, high, n in found["histogram"]]
        _bars(f"solve rates of {found['problems']:,} problems", bars, console)
        rows = [("mean", percent(found["solve_rate"])), ("never solved", f"{found['never']:,}")]
        rows += [("always solved", f"{found['always']:,}"), ("kept", f"{found['kept']:,}")]
        print_table("difficulty", [*rows, ("written to", found["out"] or "nothing: add out=FILE.jsonl")], console)
    for text in report["warnings"]:
        print_warning(text)


def _bars(title: str, rows: Sequence[tuple[str, int]], console: RichConsole) -> None:
    most = max(n for _, n in rows) or 1
    table = Table(title=title, show_header=False)
    for label, n in rows:
        table.add_row(label, f"{n:,}", "█" * round(BAR * n / most))
    console.print(table)
