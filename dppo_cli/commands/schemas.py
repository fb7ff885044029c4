"""What each command needs, as frozen dataclasses that check what their sections cannot check alone."""

from dataclasses import dataclass, replace
from typing import Any

from dppo_cli.algorithm.advantage import Advantage
from dppo_cli.algorithm.aggregation import Aggregation
from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Approximation
from dppo_cli.algorithm.combination import check_combination, unusual
from dppo_cli.algorithm.divergence import Divergence
from dppo_cli.algorithm.filters import Filter
from dppo_cli.algorithm.loss import Loss
from dppo_cli.algorithm.objective import Objective
from dppo_cli.algorithm.region import Region
from dppo_cli.commands.doctor import DoctorConfig as DoctorConfig  # there, because it has to load without torch
from dppo_cli.commands.planning.cards import check_card
from dppo_cli.commands.report import ReportConfig as ReportConfig  # for the same reason
from dppo_cli.commands.runs import RunsConfig as RunsConfig
from dppo_cli.commands.schemas_of_trained import CompareConfig as CompareConfig
from dppo_cli.commands.schemas_of_trained import EvalConfig as EvalConfig
from dppo_cli.commands.schemas_of_trained import ExportConfig as ExportConfig
from dppo_cli.commands.schemas_of_trained import SampleConfig as SampleConfig
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
    SamplesKept,
    Sampling,
    Stop,
)
from dppo_cli.data.task import DataSource
from dppo_cli.environment.environment import EnvironmentSource, NoEnvironment
from dppo_cli.errors import ConfigError
from dppo_cli.reward.scorer import RewardSource
from dppo_cli.rollout.engine import RolloutSource, steps_ahead
from dppo_cli.telemetry.console import MODES
from dppo_cli.telemetry.trackers import chosen
from dppo_cli.training.evaluation import HELD_OUT
from dppo_cli.training.order import ORDERS


@dataclass(frozen=True)
class TrainConfig:
    """Everything `dppo train` needs."""

    model: Model
    adapter: LoRA
    data: DataSource
    reward: RewardSource
    environment: EnvironmentSource
    divergence: Divergence
    approx: Approximation
    verdict: str
    region: Region
    filter: Filter
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
    eval_sets: dict[str, DataSource]
    checkpoint: Checkpointing
    stop: Stop
    samples: SamplesKept
    run_dir: str | None
    resume: str | None
    trust: bool
    seed: int
    steps: int
    anchor: str
    kl_to_reference: float
    mask_truncated: bool
    replacement_rounds: int
    order: str
    tracker: Any  # a name, or a list of them
    console: str

    def __post_init__(self) -> None:
        check_choice("anchor", self.anchor, ("rollout", "recompute"))
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1; to measure a model without training: dppo eval")
        check_choice("order", self.order, tuple(ORDERS))
        chosen(self.tracker)
        check_choice("console", self.console, MODES)
        rules = {
            "kl_to_reference >= 0": self.kl_to_reference >= 0,
            "replacement_rounds >= 0": self.replacement_rounds >= 0,
            "replacement_rounds = 0 with rollout.ahead": 0 in (self.replacement_rounds, steps_ahead(self.rollout)),
        }
        check_rules("", self, rules)
        check_combination(self.loss, self.anchor)
        if steps_ahead(self.rollout) and not isinstance(self.environment, NoEnvironment):
            raise ConfigError(
                f"rollout.ahead={steps_ahead(self.rollout)} would begin a response with one policy and end it with "
                "another, because later turns wait for the environment; use rollout.ahead=0 with it"
            )
        if self.batch.samples_per_prompt < self.advantage.min_samples:
            raise ConfigError(
                f"batch.samples_per_prompt={self.batch.samples_per_prompt} leaves nothing to compare a sample with: "
                f"this advantage needs at least {self.advantage.min_samples} samples per prompt"
            )
        if HELD_OUT in self.eval_sets:
            raise ConfigError(f"eval_sets.{HELD_OUT}: the held-out problems of `data` have that name; choose another")
        if self.stop.accuracy is not None and self.eval.every == 0:
            raise ConfigError(
                f"stop.accuracy={self.stop.accuracy:g} needs evaluations in between; set eval.every=10, for example"
            )
        if self.sampling.temperature == 0:
            raise ConfigError("sampling.temperature=0 is greedy: there is nothing to learn from equal samples")
        if self.sampling.truncates:
            raise ConfigError(
                "truncated sampling (sampling.top_p, top_k, min_p) makes the rollout policy another distribution than "
                "the one in training, and runs collapse; train with top_p=1 top_k=0 min_p=0"
            )
        self.rollout.check(self.approx.num_logprobs, self.adapter)
        self.check_processes(self.hardware.processes)

    def check_processes(self, size: int) -> None:
        """Raise ConfigError for what `size` processes cannot do together."""
        if size > 1 and self.approx.num_logprobs == WHOLE_VOCABULARY:
            raise ConfigError(
                f"approx=full needs the sampler's whole distribution, which the {size} processes would have to send to "
                "each other; use approx=topk, or one process"
            )

    @property
    def loss(self) -> Loss:
        kl_weight = self.kl_to_reference
        return Loss(self.approx, self.divergence, self.verdict, self.region, self.filter, self.objective, kl_weight)

    @property
    def eval_sampling(self) -> Sampling:
        """Untruncated sampling at the evaluation's temperature."""
        return replace(self.sampling, temperature=self.eval.temperature)

    def unusual(self) -> list[str]:
        """What is allowed but unusual, in words."""
        return list(unusual(self.loss, self.anchor, self.sampling.max_new_tokens))


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Everything `dppo plan` needs: the run that it is about, and what it is planned for."""

    json: bool
    card: str | None
    prompt_tokens: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_card(self.card)
        check_rules("", self, {"prompt_tokens >= 1 or null": self.prompt_tokens is None or self.prompt_tokens >= 1})


@dataclass(frozen=True)
class DataConfig(TrainConfig):
    """Everything `dppo data` needs: the run whose data is looked at, and at what."""

    json: bool
    rows: int
    check: int
    difficulty: bool
    problems: int | None
    keep: list[float]
    out: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "rows >= 0": self.rows >= 0,
            "check >= 0": self.check >= 0,
            "problems >= 1 or null": self.problems is None or self.problems >= 1,
            "keep = [low, high] with 0 <= low <= high <= 1": len(self.keep) == 2
            and 0 <= self.keep[0] <= self.keep[1] <= 1,
        }
        check_rules("", self, rules)
        if self.out is not None and not self.difficulty:
            raise ConfigError(f"out={self.out} is for the problems that difficulty=true keeps; add it")
