"""The state of a run: everything that a resume needs.

A run is a function from state to state, so one that was stopped and goes on from a snapshot equals an undisturbed one.
Rollouts and the order of mini-batches need no state of their own: their seeds follow from the run's seed and the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dppo_cli.training.batches import PromptOrder
from dppo_cli.training.learner import Learner


class Tally(Protocol):
    """What a listener has counted so far, as JSON."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """A `RunState` as tensors, for safetensors, and everything else, for JSON."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


@dataclass
class RunState:
    """A run after `step` steps. `eval_before`: accuracy before the first. `warnings`: what was warned of so far."""

    learner: Learner
    prompts: PromptOrder
    tallies: Mapping[str, Tally]
    step: int = 0
    eval_before: float | None = None
    warnings: list[str] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        """A copy that later steps do not change."""
        tensors, learner = self.learner.state()
        tensors |= {"random.cpu": torch.get_rng_state()}
        if self.learner.policy.device.type == "cuda":
            tensors |= {"random.cuda": torch.cuda.get_rng_state(self.learner.policy.device)}
        plain = {
            "step": self.step,
            "prompts_taken": self.prompts.taken,
            "eval_before": self.eval_before,
            "warnings": list(self.warnings),
            "learner": learner,
            "tallies": {name: tally.state() for name, tally in self.tallies.items()},
        }
        return Snapshot({name: value.clone() for name, value in tensors.items()}, plain)

    def load(self, snapshot: Snapshot) -> None:
        """Become the state that `snapshot` was taken of, in a run of the same config."""
        plain, tensors = snapshot.plain, snapshot.tensors
        self.step, self.eval_before, self.warnings = plain["step"], plain["eval_before"], list(plain["warnings"])
        random_states = {name: value for name, value in tensors.items() if name.startswith("random.")}
        self.learner.load_state({n: v for n, v in tensors.items() if n not in random_states}, plain["learner"])
        order = self.prompts
        self.prompts = PromptOrder(order.prompts, order.seed, plain["prompts_taken"])
        for name, tally in self.tallies.items():
            tally.load_state(plain["tallies"][name])
        torch.set_rng_state(random_states["random.cpu"])
        if "random.cuda" in random_states:
            torch.cuda.set_rng_state(random_states["random.cuda"], self.learner.policy.device)
