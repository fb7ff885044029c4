"""The sections of a config that are the same in every run, as frozen dataclasses that check their ranges.

Their defaults, units and effects are in conf/. Imports no torch.
"""

from dataclasses import dataclass, fields
from typing import Any

from dppo_cli.config.build import FilePath
from dppo_cli.config.checks import check_choice, check_fits, check_rules
from dppo_cli.errors import ConfigError

TEMPLATE_ARGUMENTS = frozenset(
    {"conversation", "tokenize", "add_generation_prompt", "return_dict", "chat_template", "padding", "truncation"}
    | {"max_length", "return_tensors", "continue_final_message", "tokenizer_kwargs", "return_assistant_tokens_mask"}
)
"""Arguments of transformers' `apply_chat_template` that are not the template's own."""


@dataclass(frozen=True)
class Model:
    path: FilePath
    revision: str | None
    gguf_file: str | None

    def __post_init__(self) -> None:
        if self.gguf_file is not None and not self.gguf_file.strip():
            raise ConfigError("model.gguf_file is empty; write the name of the .gguf file, or leave it out")


@dataclass(frozen=True)
class LoRA:
    r: int
    alpha: float
    dropout: float
    target_modules: Any  # "all-linear" or a list of names
    quantization: str | None
    use_dora: bool
    use_rslora: bool
    path: FilePath | None  # of the adapter that training starts from

    def __post_init__(self) -> None:
        rules = {"r >= 1": self.r >= 1, "alpha > 0": self.alpha > 0, "0 <= dropout < 1": 0 <= self.dropout < 1}
        check_rules("adapter", self, rules)
        names = self.target_modules if isinstance(self.target_modules, list) else [self.target_modules]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ConfigError(
                f"adapter.target_modules={self.target_modules} must be all-linear or a list of names, such as "
                "[q_proj,v_proj]"
            )
        check_choice("adapter.quantization", self.quantization, (None, "nf4"))


@dataclass(frozen=True)
class Hardware:
    device: str
    dtype: str
    tokens_per_micro_batch: int
    head_chunk: int
    gradient_checkpointing: bool
    processes: int

    def __post_init__(self) -> None:
        check_choice("hardware.device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("hardware.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        rules = {
            "tokens_per_micro_batch >= 1": self.tokens_per_micro_batch >= 1,
            "head_chunk >= 1": self.head_chunk >= 1,
            "processes >= 1": self.processes >= 1,
        }
        check_rules("hardware", self, rules)


@dataclass(frozen=True)
class AdamW:
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    warmup_updates: int
    schedule: str
    on_nonfinite: str
    bits: int

    def __post_init__(self) -> None:
        rules = {
            "lr > 0": self.lr > 0,
            "betas = [b1, b2] with 0 <= b < 1": len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "eps > 0": self.eps > 0,
            "weight_decay >= 0": self.weight_decay >= 0,
            "max_grad_norm > 0 or null": self.max_grad_norm is None or self.max_grad_norm > 0,
            "warmup_updates >= 0": self.warmup_updates >= 0,
        }
        check_rules("optim", self, rules)
        check_choice("optim.bits", self.bits, (32, 8))
        check_choice("optim.schedule", self.schedule, ("constant", "cosine"))
        check_choice("optim.on_nonfinite", self.on_nonfinite, ("stop", "skip"))


@dataclass(frozen=True)
class BatchPlan:
    prompts_per_step: int
    samples_per_prompt: int
    prompts_per_update: int
    epochs: int

    def __post_init__(self) -> None:
        check_rules("batch", self, {f"{f.name} >= 1": getattr(self, f.name) >= 1 for f in fields(self)})
        if self.prompts_per_step % self.prompts_per_update:
            raise ConfigError(
                f"batch.prompts_per_update={self.prompts_per_update} does not divide "
                f"batch.prompts_per_step={self.prompts_per_step}"
            )
        samples = self.prompts_per_step * self.samples_per_prompt
        check_fits("batch.prompts_per_step", self.prompts_per_step, samples)
        # What each update has seen is kept until the step ends.
        check_fits("batch.epochs", self.epochs, samples * self.epochs)

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.prompts_per_step // self.prompts_per_update


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_new_tokens: int
    stop: list[str]

    def __post_init__(self) -> None:
        rules = {
            "stop holds no empty text": all(self.stop),
            "temperature >= 0": self.temperature >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
            "0 <= min_p < 1": 0 <= self.min_p < 1,
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
        }
        check_rules("sampling", self, rules)

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Prompting:
    template: str
    system: str | None
    template_kwargs: dict[str, Any]
    too_long: str

    def __post_init__(self) -> None:
        check_choice("prompt.template", self.template, ("plain", "chat"))
        check_choice("prompt.too_long", self.too_long, ("refuse", "drop"))
        if self.system is not None and self.template == "plain":
            raise ConfigError(
                "prompt.system is set, but prompt.template=plain cannot show it; use prompt.template=chat, which needs "
                "a model with a chat template"
            )
        if self.template_kwargs and self.template == "plain":
            raise ConfigError(
                "prompt.template_kwargs is set, but prompt.template=plain has no template; use prompt.template=chat"
            )
        taken = TEMPLATE_ARGUMENTS & self.template_kwargs.keys()
        if taken:
            raise ConfigError(f"prompt.template_kwargs.{min(taken)} is set by dppo itself; leave it out")


@dataclass(frozen=True)
class Evaluation:
    every: int
    samples_per_prompt: int
    temperature: float
    success_reward: float

    def __post_init__(self) -> None:
        rules = {
            "every >= 0": self.every >= 0,
            "samples_per_prompt >= 1": self.samples_per_prompt >= 1,
            "temperature >= 0": self.temperature >= 0,
        }
        check_rules("eval", self, rules)


@dataclass(frozen=True)
class Stop:
    """When a run ends before its last step."""

    seconds: float | None
    accuracy: float | None

    def __post_init__(self) -> None:
        rules = {
            "seconds > 0 or null": self.seconds is None or self.seconds > 0,
            "0 < accuracy <= 1 or null": self.accuracy is None or 0 < self.accuracy <= 1,
        }
        check_rules("stop", self, rules)

    def reason(self, seconds: float, accuracy: float | None) -> str | None:
        """Why a run that took so long and reached such an accuracy ends now; None if it goes on."""
        if self.seconds is not None and seconds >= self.seconds:
            return f"stop.seconds={self.seconds:g} are over"
        if self.accuracy is not None and accuracy is not None and accuracy >= self.accuracy:
            return f"stop.accuracy={self.accuracy:g} is reached"
        return None


@dataclass(frozen=True)
class Checkpointing:
    every: int
    keep: int
    grace: float

    def __post_init__(self) -> None:
        rules = {"every >= 0": self.every >= 0, "keep >= 1": self.keep >= 1, "grace >= 0": self.grace >= 0}
        check_rules("checkpoint", self, rules)


@dataclass(frozen=True)
class SamplesKept:
    every: int
    groups: int
    max_mib: float

    def __post_init__(self) -> None:
        rules = {"every >= 0": self.every >= 0, "groups >= 1": self.groups >= 1, "max_mib > 0": self.max_mib > 0}
        check_rules("samples", self, rules)
