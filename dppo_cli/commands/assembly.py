"""From a run's config to parts of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.sections import Prompting
from dppo_cli.environment.environment import Environment
from dppo_cli.policy.policy import Policy
from dppo_cli.processes.crew import Crew
from dppo_cli.reward.scorer import Scorer
from dppo_cli.rollout.ahead import AheadCollector
from dppo_cli.rollout.collect import Collector, InStepCollector
from dppo_cli.rollout.engine import RolloutEngine, RolloutSource, in_each_process, steps_ahead
from dppo_cli.rollout.shared import SharedEngine
from dppo_cli.rollout.turns import TurnsEngine
from dppo_cli.telemetry.table import print_warning
from dppo_cli.training.learner import Learner
from dppo_cli.training.order import ORDERS, LookAhead, PromptOrder
from dppo_cli.training.shared import SharedLearner
from dppo_cli.training.trainer import Trainer
from dppo_cli.types import Prompt, RunInfo
from dppo_cli.world import World


def make_learner(
    policy: Policy, config: TrainConfig, warn: Callable[[str], None] = print_warning, world: World | None = None
) -> Learner:
    return Learner(
        policy,
        config.loss,
        config.aggregation,
        config.optim,
        config.hardware,
        temperature=config.sampling.temperature,
        max_new_tokens=config.sampling.max_new_tokens,
        total_updates=config.steps * config.batch.updates_per_step,
        warn=warn,
        world=world,
    )


def with_processes(config_yaml: str, size: int) -> str:
    """The config of a run whose processes a launcher has started: a resume knows how many there were."""
    node = OmegaConf.create(config_yaml)
    node.hardware.processes = size
    return OmegaConf.to_yaml(node)


def load_engine(source: RolloutSource, policy: Policy, crew: Crew, warn: Callable[[str], None]) -> RolloutEngine:
    """The engine of this process, or those of all processes of the crew as one."""
    engine = source.load(policy, warn)
    return SharedEngine(engine, crew) if crew.size > 1 and in_each_process(source) else engine


def in_turns(
    engine: RolloutEngine, environment: Environment | None, policy: Policy, prompting: Prompting
) -> RolloutEngine:
    """The engine itself, or with an environment that answers the model."""
    return engine if environment is None else TurnsEngine(engine, environment, policy, prompting)


def make_order(config: TrainConfig, prompts: Sequence[Prompt]) -> PromptOrder:
    order = ORDERS[config.order](prompts, config.seed)
    return LookAhead(order) if steps_ahead(config.rollout) else order


def make_collector(config: TrainConfig, engine: RolloutEngine, scorer: Scorer, order: PromptOrder) -> Collector:
    """`order`: what `make_order` has made."""
    collector = InStepCollector(
        engine,
        scorer,
        config.advantage,
        config.batch,
        config.sampling,
        config.approx.num_logprobs,
        config.seed,
        config.mask_truncated,
        config.replacement_rounds,
    )
    if not isinstance(order, LookAhead):
        return collector
    return AheadCollector(collector, order.peek, steps_ahead(config.rollout), config.steps)


def shared_learner(learner: Learner, crew: Crew) -> Trainer:
    """The same of learners."""
    return learner if crew.size == 1 else SharedLearner(learner, crew)


def run_info(run_dir: Path, config: TrainConfig, policy: Policy, engine: RolloutEngine, step: int) -> RunInfo:
    return RunInfo(
        run_dir=run_dir,
        step=step,
        steps=config.steps,
        model=config.model.path,
        parameters=sum(p.numel() for p in policy.model.parameters()),
        trained_parameters=sum(p.numel() for p in policy.parameters),
        device=str(policy.device),
        dtype=str(policy.dtype).removeprefix("torch."),
        samples_with=engine.samples_with,
    )
