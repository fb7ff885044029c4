"""What each command needs, as frozen dataclasses that check what their sections cannot check alone."""

from dataclasses import dataclass, replace

from dppo_cli.algorithm.advantage import Advantage
from dppo_cli.algorithm.aggregation import Aggregation
from dppo_cli.algorithm.approx import Approximation
from dppo_cli.algorithm.divergence import Divergence
from dppo_cli.algorithm.loss import Loss
from dppo_cli.algorithm.objective import Objective
from dppo_cli.config.checks import check_choice, check_rules
from dppo_cli.config.sections import (
    AdamW,
    BatchPlan,
    Checkpointing,
    Evaluation,
    Hardware,
    LoRA,
    Model,
    Prompting,
    Sampling,
)
from dppo_cli.data.task import DataSource
from dppo_cli.errors import ConfigError
from dppo_cli.reward.scorer import RewardSource
from dppo_cli.rollout.engine import RolloutSource


@dataclass(frozen=True)
class TrainConfig:
    """Everything `dppo train` needs."""

    model: Model
    adapter: LoRA
    data: DataSource
    reward: RewardSource
    divergence: Divergence
    approx: Approximation
    objective: Objective
    advantage: Advantage
    aggregation: Aggregation
    rollout: RolloutSource
    hardware: Hardware
    optim: AdamW
    batch: BatchPlan
    sampling: Sampling
    prompt: Prompting
    eval: Evaluation
    checkpoint: Checkpointing
    run_dir: str | None
    resume: str | None
    trust: bool
    seed: int
    steps: int
    anchor: str
    kl_to_reference: float

    def __post_init__(self) -> None:
        check_choice("anchor", self.anchor, ("rollout", "recompute"))
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1; to measure a model without training: dppo eval")
        check_rules("", self, {"kl_to_reference >= 0": self.kl_to_reference >= 0})
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

    @property
    def loss(self) -> Loss:
        return Loss(self.approx, self.divergence, self.objective, self.kl_to_reference)

    @property
    def eval_sampling(self) -> Sampling:
        """Untruncated sampling at the evaluation's temperature."""
        return replace(self.sampling, temperature=self.eval.temperature)

    def unusual(self) -> list[str]:
        """What is allowed but unusual, in words."""
        found = []
        usual = getattr(self.divergence, "usual_delta", None)
        for key in ("delta_low", "delta_high"):
            delta = getattr(self.divergence, key)
            if usual and not usual[0] <= delta <= usual[1]:
                found.append(
                    f"divergence.{key}={delta} lies outside {usual[0]:g} to {usual[1]:g}, where this divergence worked "
                    "in the paper; thresholds of TV and KL are on different scales"
                )
        return found


@dataclass(frozen=True)
class EvalConfig:
    """Everything `dppo eval` needs. What the user has not set comes from the run (`evaluate.prepare`)."""

    run: str | None
    trust: bool
    model: Model
    adapter: LoRA | None
    data: DataSource
    reward: RewardSource
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


FORMATS = ("adapter", "merged")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportConfig:
    """Everything `dppo export` needs. What the user has not set comes from the run (`export.prepare`)."""

    run: str
    trust: bool
    format: str
    out: str | None
    dtype: str
    model: Model
    adapter: LoRA
    data: DataSource
    prompt: Prompting
    hardware: Hardware

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        check_choice("dtype", self.dtype, DTYPES)
