"""What tests of checkpoints share: checkpoints of chosen steps, without a run."""

import math
from pathlib import Path

import torch

from dppo_cli.training.checkpoint import checkpoints, step_of, write_checkpoint
from dppo_cli.training.state import Snapshot


def write_adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"weights")


def snapshot(step: int) -> Snapshot:
    """Of every kind of number that a state holds, and of values that a careless format would change."""
    plain = {
        "step": step,
        "seconds": 0.1 + 0.2,
        "best": (4, 1 / 3),
        "warnings": ["ü \u2028 \n 'quoted'"],
        "tallies": {"watch": {"nan": math.nan, "none": None, "large": 2**63}},
    }
    tensors = {
        "nan and zero": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
        "payload": torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32),
        "bfloat16": torch.linspace(-1, 1, 15).reshape(3, 5).bfloat16(),
        "float64": torch.tensor([0.1, 1 / 3], dtype=torch.float64),
        "random": torch.Generator().manual_seed(step).get_state(),
        "scalar": torch.tensor(float(step)),
        "empty": torch.empty(0, 4),
    }
    return Snapshot(tensors, plain)


def write(run: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(run, snapshot(step), write_adapter, "the config's") for step in steps]


def steps_of(run: Path) -> list[int | None]:
    return [step_of(path) for path in checkpoints(run)]
