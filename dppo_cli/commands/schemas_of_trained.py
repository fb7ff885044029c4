"""What the commands that take a run or a model need, as frozen dataclasses; see `schemas.py`."""

import re
from dataclasses import dataclass

from dppo_cli.config.build import FilePath
from dppo_cli.config.checks import check_choice, check_rules
from dppo_cli.config.sections import Evaluation, Hardware, LoRA, Model, Prompting, Sampling
from dppo_cli.data.task import DataSource
from dppo_cli.environment.environment import EnvironmentSource
from dppo_cli.errors import ConfigError
from dppo_cli.reward.scorer import RewardSource
from dppo_cli.rollout.engine import RolloutSource
from dppo_cli.training.card import HUB_NAME


@dataclass(frozen=True)
class EvalConfig:
    """Everything `dppo eval` needs. What the user has not set comes from the run (`evaluate.prepare`)."""

    run: str | None
    checkpoint: str
    trust: bool
    model: Model
    adapter: LoRA | None
    data: DataSource
    reward: RewardSource
    environment: EnvironmentSource
    rollout: RolloutSource
    hardware: Hardware
    prompt: Prompting
    sampling: Sampling
    samples_per_prompt: int
    pass_k: list[int]
    success_reward: float
    seed: int
    out: str | None

    def __post_init__(self) -> None:
        check_rules("", self, {"samples_per_prompt >= 1": self.samples_per_prompt >= 1})
        for k in self.pass_k:
            if not 1 <= k <= self.samples_per_prompt:
                raise ConfigError(f"pass_k={k} needs between 1 and samples_per_prompt={self.samples_per_prompt}")


@dataclass(frozen=True)
class CompareConfig:
    """Everything `dppo compare` needs: how each side is evaluated (`compare.prepare`), and what is made of it."""

    run: str
    other: str
    first: EvalConfig
    second: EvalConfig
    shown: int
    out: str | None
    json: bool

    def __post_init__(self) -> None:
        check_rules("", self, {"shown >= 0": self.shown >= 0})


FORMATS, DTYPES = ("adapter", "merged", "gguf"), ("float32", "bfloat16", "float16")
QUANTISATIONS = ("q8_0",)
"""What llama.cpp's converter writes beside plain numbers."""
BASES = ("original", "dequantized")


@dataclass(frozen=True)
class ExportConfig:
    """Everything `dppo export` needs. What the user has not set comes from the run (`export.prepare`)."""

    run: str
    trust: bool
    format: str
    out: str | None
    dtype: str
    base: str
    checkpoint: str
    check: str
    max_shard_size: str
    converter: FilePath | None
    push_to_hub: str | None
    push_private: bool
    model: Model
    adapter: LoRA
    data: DataSource
    reward: RewardSource
    environment: EnvironmentSource
    rollout: RolloutSource
    prompt: Prompting
    sampling: Sampling
    eval: Evaluation
    hardware: Hardware
    seed: int

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        check_choice("dtype", self.dtype, (*DTYPES, *QUANTISATIONS) if self.format == "gguf" else DTYPES)
        check_choice("base", self.base, BASES)
        check_choice("check", self.check, ("logits", "accuracy"))
        if self.base == "dequantized" and (self.format == "adapter" or self.adapter.quantization is None):
            raise ConfigError("base=dequantized is for merging a run with a quantised base (format=merged, QLoRA)")
        if self.converter is not None and self.format != "gguf":
            raise ConfigError(f"converter={self.converter} is for format=gguf; leave it out")
        if self.push_to_hub is not None and not HUB_NAME.fullmatch(self.push_to_hub):
            raise ConfigError(f"push_to_hub={self.push_to_hub} is not OWNER/NAME; OWNER is you or an organisation")
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", self.max_shard_size):
            raise ConfigError(f"max_shard_size={self.max_shard_size} is no size; write 500MB or 5GB, for example")


@dataclass(frozen=True)
class SampleConfig:
    """Everything `dppo sample` needs. What the user has not set comes from the run (`sample.prepare`)."""

    run: str | None
    trust: bool
    model: Model
    adapter: LoRA | None
    environment: EnvironmentSource
    hardware: Hardware
    prompt: Prompting
    sampling: Sampling
    text: str | None
    samples: int
    seed: int
    json: bool

    def __post_init__(self) -> None:
        check_rules("", self, {"1 <= samples <= 10000": 1 <= self.samples <= 10_000})
        if self.text is not None and not self.text.strip():
            raise ConfigError('text is empty; write text="...", or leave it out to type prompts')
        if self.text is None and self.prompt.template == "chat" and self.samples > 1:
            raise ConfigError(
                f'samples={self.samples} would make a conversation of as many branches; use samples=1, or text="..."'
            )
