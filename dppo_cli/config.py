"""From composed YAML to typed, frozen, checked config objects. Imports no torch.

`build()` is where OmegaConf ends: the rest of the program sees dataclasses. A node with `_target_` becomes that class,
a section becomes the dataclass that its root declares. Types and unknown keys are checked by OmegaConf's structured
configs, ranges by each class's `__post_init__`, combinations by the root's. YAML is the only home of defaults.
"""

import dataclasses
import difflib
import importlib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from dppo_cli.errors import ConfigError

if TYPE_CHECKING:
    from dppo_cli.algorithm.advantage import Advantage
    from dppo_cli.algorithm.aggregation import Aggregation
    from dppo_cli.algorithm.approx import Approximation
    from dppo_cli.algorithm.divergence import Divergence
    from dppo_cli.algorithm.objective import Objective
    from dppo_cli.data.task import DataSource
    from dppo_cli.reward.scorer import RewardSource
    from dppo_cli.rollout.engine import RolloutSource

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    path: str
    revision: str | None


@dataclass(frozen=True)
class LoRA:
    r: int
    alpha: float
    dropout: float
    target_modules: Any  # "all-linear" or a list of names
    quantization: str | None

    def __post_init__(self) -> None:
        rules = {"r >= 1": self.r >= 1, "alpha > 0": self.alpha > 0, "0 <= dropout < 1": 0 <= self.dropout < 1}
        _check("adapter", self, rules)
        _choice("adapter.quantization", self.quantization, (None, "nf4"))


@dataclass(frozen=True)
class Hardware:
    device: str
    dtype: str
    tokens_per_micro_batch: int
    head_chunk: int
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        _choice("hardware.device", self.device, ("auto", "cpu", "cuda"))
        _choice("hardware.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        rules = {
            "tokens_per_micro_batch >= 1": self.tokens_per_micro_batch >= 1,
            "head_chunk >= 1": self.head_chunk >= 1,
        }
        _check("hardware", self, rules)


@dataclass(frozen=True)
class AdamW:
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    warmup_updates: int
    schedule: str

    def __post_init__(self) -> None:
        rules = {
            "lr > 0": self.lr > 0,
            "betas = [b1, b2] with 0 <= b < 1": len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "eps > 0": self.eps > 0,
            "weight_decay >= 0": self.weight_decay >= 0,
            "max_grad_norm > 0 or null": self.max_grad_norm is None or self.max_grad_norm > 0,
            "warmup_updates >= 0": self.warmup_updates >= 0,
        }
        _check("optim", self, rules)
        _choice("optim.schedule", self.schedule, ("constant", "cosine"))


@dataclass(frozen=True)
class BatchPlan:
    prompts_per_step: int
    samples_per_prompt: int
    prompts_per_update: int
    epochs: int

    def __post_init__(self) -> None:
        _check("batch", self, {f"{f.name} >= 1": getattr(self, f.name) >= 1 for f in fields(self)})
        if self.prompts_per_step % self.prompts_per_update:
            raise ConfigError(
                f"batch.prompts_per_update={self.prompts_per_update} does not divide "
                f"batch.prompts_per_step={self.prompts_per_step}"
            )

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

    def __post_init__(self) -> None:
        rules = {
            "temperature >= 0": self.temperature >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
            "0 <= min_p < 1": 0 <= self.min_p < 1,
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
        }
        _check("sampling", self, rules)

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Prompting:
    template: str
    system: str | None

    def __post_init__(self) -> None:
        _choice("prompt.template", self.template, ("plain", "chat"))
        if self.system is not None and self.template == "plain":
            raise ConfigError("prompt.system is set but prompt.template=plain has no place for it; use template=chat")


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
        _check("eval", self, rules)


@dataclass(frozen=True)
class TrainConfig:
    """Everything `dppo train` needs. `warnings`: what is allowed but unusual, in words."""

    model: Model
    adapter: LoRA
    data: "DataSource"
    reward: "RewardSource"
    divergence: "Divergence"
    approx: "Approximation"
    objective: "Objective"
    advantage: "Advantage"
    aggregation: "Aggregation"
    rollout: "RolloutSource"
    hardware: Hardware
    optim: AdamW
    batch: BatchPlan
    sampling: Sampling
    prompt: Prompting
    eval: Evaluation
    run_dir: str | None
    seed: int
    steps: int
    anchor: str
    kl_to_reference: float
    checkpoint_every: int
    warnings: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        _choice("anchor", self.anchor, ("rollout", "recompute"))
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1; to measure a model without training: dppo eval")
        rules = {"kl_to_reference >= 0": self.kl_to_reference >= 0, "checkpoint_every >= 0": self.checkpoint_every >= 0}
        _check("", self, rules)
        if self.batch.samples_per_prompt < self.advantage.min_samples:
            raise ConfigError(
                f"batch.samples_per_prompt={self.batch.samples_per_prompt} leaves nothing to compare a sample with: "
                f"this advantage needs at least {self.advantage.min_samples} samples per prompt"
            )
        if self.sampling.temperature == 0:
            raise ConfigError("sampling.temperature=0 is greedy: there is nothing to learn from equal samples")
        if self.sampling.truncates:
            raise ConfigError(
                "truncated sampling (sampling.top_p, top_k, min_p) makes the rollout policy another distribution than "
                "the one in training, and runs collapse; train with top_p=1 top_k=0 min_p=0"
            )
        self.rollout.check(self.approx.num_logprobs, self.anchor, self.adapter)
        self.warnings.extend(_unusual(self))

    @property
    def eval_sampling(self) -> Sampling:
        """Untruncated sampling at the evaluation's temperature."""
        return replace(self.sampling, temperature=self.eval.temperature)


@dataclass(frozen=True)
class PlainModel:
    path: str | None
    revision: str | None


@dataclass(frozen=True)
class EvalSampling:
    temperature: float | None
    top_p: float
    top_k: int
    min_p: float
    max_new_tokens: int | None

    def over(self, base: Sampling) -> Sampling:
        """The sampling of an evaluation; `base` serves where nothing was set."""
        temperature = base.temperature if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_p, self.top_k, self.min_p, self.max_new_tokens or base.max_new_tokens)


@dataclass(frozen=True)
class EvalPrompting:
    template: str | None
    system: str | None

    def over(self, trained: Prompting | None) -> Prompting:
        """The prompting of an evaluation; that of the run, or plain, serves where nothing was set."""
        base = trained or Prompting("plain", None)
        if self.template is None:
            return Prompting(base.template, self.system or base.system)
        return Prompting(self.template, self.system)


@dataclass(frozen=True)
class EvalConfig:
    """Everything `dppo eval` needs. What is None comes from the run."""

    run: str | None
    model: PlainModel
    data: "DataSource | None"
    reward: "RewardSource | None"
    rollout: "RolloutSource"
    hardware: Hardware
    prompt: EvalPrompting
    sampling: EvalSampling
    samples_per_prompt: int
    pass_k: list[int]
    success_reward: float | None
    seed: int
    out: str | None

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model.path is None):
            raise ConfigError(
                "name what to evaluate: a run (run=runs/last) or a plain model (model.path=...), one of them"
            )
        if self.run is None and self.data is None:
            raise ConfigError("a plain model brings no problems along; add data=arithmetic, or data=file data.path=...")
        for k in self.pass_k:
            if not 1 <= k <= self.samples_per_prompt:
                raise ConfigError(f"pass_k={k} needs between 1 and samples_per_prompt={self.samples_per_prompt}")


@dataclass(frozen=True)
class ExportConfig:
    """Everything `dppo export` needs."""

    run: str
    format: str
    out: str | None
    dtype: str

    def __post_init__(self) -> None:
        _choice("format", self.format, ("adapter", "merged"))
        _choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))


def build(schema: type[T], node: DictConfig) -> T:
    """The frozen object of class `schema` that `node` describes.

    Fields of a root (`TrainConfig`, ...) are built one by one: a node with `_target_` becomes that class, a section the
    dataclass its annotation names. Raises ConfigError for unknown keys, wrong types, unset mandatory values, values out
    of range, and combinations that cannot work; the text names the key as the user typed it.
    """
    known = {f.name: f for f in fields(schema) if f.init}  # type: ignore[arg-type]
    for key in node:
        if key not in known:
            raise ConfigError(f"there is no key {key!r}{did_you_mean(str(key), known)}")
    return schema(**{name: _build_field(name, f.type, node) for name, f in known.items()})


def _build_field(name: str, annotation: Any, node: DictConfig) -> Any:
    if name not in node or OmegaConf.is_missing(node, name):
        raise ConfigError(f"{name} is not set; add {name}=...")
    child = node._get_node(name)
    if isinstance(child, DictConfig) and not child._is_none():
        target = child.get("_target_")
        if not target and not is_dataclass(annotation):
            raise ConfigError(f"{name} cannot hold keys; see `dppo --help`")
        return _structured(_locate(name, target) if target else annotation, child, name)
    if isinstance(annotation, str):
        # One of the protocols above, which only a `_target_` can fill.
        if node[name] is None and annotation.endswith("| None"):
            return None
        raise ConfigError(f"{name}={node[name]} is no choice; see `dppo --help`")
    scalar = dataclasses.make_dataclass("Root", [(name, annotation)])
    return getattr(_structured(scalar, OmegaConf.create({name: node[name]}), ""), name)


def _structured(cls: type, node: DictConfig, where: str) -> Any:
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        plain.pop("_target_", None)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ConfigError(f"{key} is not set; add {key}=...") from None
    except ConfigKeyError as error:
        key = str(error.key)
        choices = [f.name for f in fields(cls)]
        raise ConfigError(f"there is no key {where}.{key}{did_you_mean(key, choices)}") from None
    except ValidationError as error:
        key = ".".join(filter(None, (where, str(error.full_key or error.key or ""))))
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    except (InterpolationResolutionError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None


def _locate(where: str, target: str) -> type:
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}._target_={target} cannot be imported: {error}") from error
    if not is_dataclass(cls):
        raise ConfigError(f"{where}._target_={target} is not a dataclass")
    return cls  # type: ignore[return-value]


def did_you_mean(word: str, choices: Any) -> str:
    """'; did you mean X? Choices: ...', to be put behind a complaint."""
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"{guess} Choices: {', '.join(choices)}"


def _unusual(config: TrainConfig) -> list[str]:
    found = []
    usual = getattr(config.divergence, "usual_delta", None)
    for key in ("delta_low", "delta_high"):
        delta = getattr(config.divergence, key)
        if usual and not usual[0] <= delta <= usual[1]:
            found.append(
                f"divergence.{key}={delta} lies outside {usual[0]:g} to {usual[1]:g}, where this divergence worked "
                "in the paper; thresholds of TV and KL are on different scales"
            )
    return found


def _choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        names = ["null" if c is None else str(c) for c in choices]
        raise ConfigError(f"{key}={value} is no choice{did_you_mean(str(value), names)}")


def _check(where: str, of: Any, rules: dict[str, bool]) -> None:
    """Raise ConfigError for the first rule that does not hold; a rule's text names the field it is about."""
    for rule, holds in rules.items():
        if not holds:
            name = next(f.name for f in fields(of) if f.name in rule.split())
            raise ConfigError(f"{where + '.' if where else ''}{name}={getattr(of, name)} breaks the rule {rule}")
