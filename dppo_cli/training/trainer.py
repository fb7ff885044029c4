"""What the loop asks of whatever trains the policy, in one process or in several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dppo_cli.policy.policy import Policy
from dppo_cli.types import Group, SampleStats, TokenStats


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step. `stats`: what was seen of its tokens. `num_positions`: tokens and padding that ran."""

    stats: list[TokenStats]
    kept: list[SampleStats]  # the same of each sample of a group that is kept
    gradient_norm: float | None  # None: the update was skipped
    lr: float
    sequences: int
    skipped_sequences: int
    num_positions: int
    num_padding: int


class Trainer(Protocol):
    """`anchored()` before the updates of a step, `update()` for each mini-batch."""

    @property
    def policy(self) -> Policy: ...

    @property
    def warn(self) -> Callable[[str], None]: ...

    def anchored(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the trainer's own report of the policy as it is now as their anchors (anchor=recompute)."""
        ...

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        """One optimizer step on `groups`.

        Raises NumericalError, with no weight changed, if a loss or a gradient is not finite.
        """
        ...

    def skipped(self, groups: Sequence[Group]) -> UpdateResult:
        """The update that was left out, for the record; the schedule counts it."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resume needs: the adapter and the optimizer's moments as tensors, the schedule's position as JSON."""
        ...

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Go on from what `state()` gave."""
        ...
