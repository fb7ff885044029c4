"""From composed YAML to typed, frozen, checked config objects. Imports no torch.

`build()` is where OmegaConf ends: the rest of the program sees dataclasses. A node with `_target_` becomes that class,
a section becomes the dataclass that its root declares. Types and unknown keys are checked by OmegaConf's structured
configs, ranges by each class's `__post_init__`, combinations by the root's. YAML is the only home of defaults.
"""

import dataclasses
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
from dppo_cli.sections import (
    AdamW,
    BatchPlan,
    EvalPrompting,
    EvalSampling,
    Evaluation,
    Hardware,
    LoRA,
    Model,
    PlainModel,
    Prompting,
    Sampling,
    check_choice,
    check_rules,
    did_you_mean,
)

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
        check_choice("anchor", self.anchor, ("rollout", "recompute"))
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1; to measure a model without training: dppo eval")
        rules = {"kl_to_reference >= 0": self.kl_to_reference >= 0, "checkpoint_every >= 0": self.checkpoint_every >= 0}
        check_rules("", self, rules)
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
        self.rollout.check(self.approx.num_logprobs, self.adapter)
        self.warnings.extend(_unusual(self))

    @property
    def eval_sampling(self) -> Sampling:
        """Untruncated sampling at the evaluation's temperature."""
        return replace(self.sampling, temperature=self.eval.temperature)


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
        check_choice("format", self.format, ("adapter", "merged"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))


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
