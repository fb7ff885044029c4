"""Plans that tests share: the same words are planned once."""

from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from helpers import composed
from omegaconf import OmegaConf
from transformers import LlamaConfig

from dppo_cli.commands.plan import make_report, prepare
from dppo_cli.commands.planning.machine import GIB, Machine, Speed, find_machine
from dppo_cli.commands.schemas import PlanConfig
from dppo_cli.config.build import build

RUNTIME = 0.5 * GIB
SPEED = Speed(1e12, 1e11, 1e-5, "made up", 1e11)


def speed() -> Speed:
    return SPEED


def machine(gib: float, device: str = "cpu") -> Machine:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Machine("test", device, dtype, gib * GIB, gib * GIB, False, speed, 0)


def built(*words: str) -> PlanConfig:
    """What `dppo plan <words>` builds."""
    node = OmegaConf.create(OmegaConf.to_container(composed("plan", *words)))
    return build(PlanConfig, prepare(node, words))


@cache
def report(of: Machine, *words: str) -> dict[str, Any]:
    """Of a machine that is made up. Shared: read, never written."""
    return make_report(built(*words), of, RUNTIME)


@cache
def plan(*words: str) -> dict[str, Any]:
    """Of the machine that the words say. Shared, as above."""
    config = built(*words)
    return make_report(config, find_machine(config.hardware, config.card), RUNTIME)


def save_llama_8b(folder: Path) -> Path:
    """The shapes of Llama 3.1 8B and a small tokenizer; no weights."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
