"""Run folders as `dppo train` leaves them, of any length and with any samples, in milliseconds."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.config.saved import sign, to_yaml

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "\u202eright to left",
    "مرحبا",
    "👩‍🚀",
    "\x00\x1b[31m",
    "\n",
    "\ud83d",
    "\u2028",
    "",
)
"""Tokens that a page could stumble over."""


def metrics(step: int, steps: int) -> dict[str, Any]:
    """A line of metrics.jsonl: accuracy rises from 0.3 to 0.8, every fifth step masks some tokens."""
    share = 0.3 + 0.5 * step / steps
    masked = 0.01 if step % 5 == 0 else 0.0
    found = {
        "step": step,
        "reward": share,
        "reward_parts": {},
        "accuracy": share,
        "unjudged": 0.0,
        "equal_groups": 0.1,
        "sampled_groups": 64,
        "sampling_rounds": 1,
        "prompt_tokens": 5.5,
        "response_tokens": 3.3,
        "response_tokens_max": 6,
        "finished": 1.0,
        "mismatch_mean": 1.5e-7,
        "shift_mean": 0.003,
        "shift_max": 0.04,
        "masked_positive": masked,
        "masked_negative": 2 * masked,
        "entropy": 1 - 0.5 * share,
        "reference_kl": 0.0,
        "gradient_norm": 0.25,
        "lr": 0.0003,
        "skipped": 0.03,
        "padding": 0.16,
    }
    for name, scale in (("divergence", 0.05), ("ratio", 1.0)):
        found |= {f"{name}_p{q}": scale * (1 + q / 100) for q in (50, 90, 99, 100)}
    found["ratio_p1"] = 0.9
    time = {"rollout": 0.5, "reward": 0.001, "update": 1.7, "total": 2.3}
    found["time"] = {**time, "rollout_tokens_per_second": 3000.0, "tokens_per_second": 500.0}
    found["memory"] = {"process_gib": 0.5, "process_peak_gib": 0.75}
    return found


def figures(accuracy: float, low: float, high: float) -> dict[str, Any]:
    return {"problems": 500, "samples": 500, "accuracy": accuracy, "interval": [low, high]}


def summary(steps: int, **more: Any) -> dict[str, Any]:
    return {
        "eval_before": 0.3,
        "eval_after": 0.8,
        "evaluations": {
            "held_out": {
                "before": figures(0.3, 0.26, 0.34),
                "after": figures(0.8, 0.76, 0.84),
                "difference": {"mean": 0.5, "interval": [0.45, 0.55], "problems": 500},
            }
        },
        "steps": steps,
        "interrupted": False,
        "seconds": 3700.0,
        "peak_memory_gib": 0.68,
        "trained_parameters": 339968,
        "warnings": [],
        **more,
    }


def sample(tokens: Sequence[str], **more: Any) -> dict[str, Any]:
    """A line of samples/step-N.jsonl. Divergence rises from token to token; the last ones are masked."""
    n = len(tokens)
    divergence = [0.3 * (i + 1) / n for i in range(n)]
    return {
        "step": 1,
        "problem": 7,
        "sample": 0,
        "prompt": "What is 3+4?",
        "answer": "7",
        "completion": "".join(tokens),
        "status": "finished",
        "score": 1.0,
        "parts": {"exact": 1.0},
        "note": None,
        "advantage": 0.5,
        "token_ids": list(range(n)),
        "tokens": list(tokens),
        "sampled": [True] * n,
        "logp_mu": [-1.0] * n,
        "logp_pi": [-1.0 + math.log(1 + d) for d in divergence],
        "divergence": divergence,
        "keep": [d <= 0.15 for d in divergence],
        "top_ids": [[i, 0, 99] for i in range(n)],
        "top_logp_mu": [[-1.0, -2.0, -3.0]] * n,
        "top_logp_pi": [[-0.9, -2.1, -3.1]] * n,
        **more,
    }


def write_run(
    folder: Path,
    steps: int = 12,
    samples: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    done: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """A run of so many steps. `done`: its summary; None: one that goes on."""
    folder.mkdir(parents=True)
    node = OmegaConf.create(OmegaConf.to_container(composed("train", f"steps={steps}", *overrides)))
    (folder / "config.yaml").write_text(sign(to_yaml(node)), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [metrics(step, steps) for step in range(1, steps + 1)])
    if done is not None:
        (folder / "summary.json").write_text(json.dumps(done), encoding="utf-8")
        (folder / "masked_tokens.json").write_text("[]", encoding="utf-8")
    for step, rows in (samples or {}).items():
        (folder / "samples").mkdir(exist_ok=True)
        write_lines(folder / f"samples/step-{step}.jsonl", rows)
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
