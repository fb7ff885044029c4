"""A worker of `dppo train` or `dppo eval`: it has what the main process has, but for the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import EvalConfig, TrainConfig
from dppo_cli.policy.loading import load_policy
from dppo_cli.processes.crew import WARNING, serve
from dppo_cli.processes.line import Line
from dppo_cli.processes.worker import hear_no_signals, join
from dppo_cli.rollout.engine import RolloutEngine, in_each_process
from dppo_cli.training.failures import out_of_memory
from dppo_cli.training.shared import WorkersLearner
from dppo_cli.types import Completion, Prompt
from dppo_cli.world import World

WORK = f"{__name__}:work"
"""As a worker that is started finds it."""
OF_LEARNER = ("load_state", "anchors", "gradient", "step", "drop_gradient", "skipped")


def work(line: Line, world: World) -> None:
    """Do what the main process asks for until it closes the line."""
    hear_no_signals()

    def warn(text: str) -> None:
        line.send((WARNING, text))

    def load(config: TrainConfig | EvalConfig, saved_adapter: Path | None = None) -> None:
        """In training the weights of the adapter come later, with the state of the main process."""
        policy = load_policy(
            config.model,
            config.hardware,
            warn=warn,
            adapter=config.adapter,
            saved_adapter=saved_adapter,
            seed=config.seed,
        )
        if in_each_process(config.rollout):
            engine = closing.enter_context(config.rollout.load(policy, warn))
            methods.update({"sync": engine.sync, "generate": partial(numbered, engine)})
        if isinstance(config, TrainConfig):
            learner = WorkersLearner(make_learner(policy, config, warn, world))
            methods.update({name: getattr(learner, name) for name in OF_LEARNER})

    methods: dict[str, Callable[..., Any]] = {"join": partial(join, world), "load": load}
    with ExitStack() as closing:
        serve(line, methods, out_of_memory)


def numbered(
    engine: RolloutEngine, start: int, prompts: Sequence[Prompt], *how: Any
) -> Iterator[tuple[int, list[Completion]]]:
    """As `RolloutEngine.generate`, of the part of the prompts that begins with number `start` of the whole call."""
    for number, completions in engine.generate(prompts, *how) if prompts else ():
        yield start + number, completions
