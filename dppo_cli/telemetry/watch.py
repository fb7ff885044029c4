"""Warnings in words when a run's trust region looks wrong. Each is given once."""

from collections.abc import Callable, Mapping
from typing import Any

from dppo_cli.training.files import as_count, as_number
from dppo_cli.types import EvalReport, RunInfo, StepReport

QUIET_STEPS = 30
"""Steps in a row without a masked token after which the trust region is probably too wide, or nothing is learnt."""
BUSY_SHARE = 0.20
"""Share of masked tokens above which the region is probably too narrow, or the steps are too large."""
FILTERED_SHARE = 0.30
"""Share of tokens above which the off-policy filter takes away much of what a step could learn from."""
UNJUDGED_SHARE = 0.5
"""Share of samples without a score above which the reward does not fit the data, most likely."""
LARGE_MISMATCH = 0.02
"""Mean |pi-mu| before any update. A 1.5B model in bf16 with another engine shows about 0.004."""
GROWTH = 3.0
"""Factor over the first step's mismatch that counts as growing."""
NOISE = 1e-4
"""Mismatch below which growth is rounding."""


class Watch:
    """A listener that looks at each step's metrics and warns of what is unusual."""

    def __init__(self, masks: bool, warn: Callable[[str], None], answered: bool = False) -> None:
        """`masks`: whether the trust region can ever mask a token: with one update per rollout pi is mu.

        `answered`: whether there is an environment.
        """
        self.masks, self.warn, self.answered = masks, warn, answered
        self.quiet_steps = 0
        self.first_mismatch: float | None = None
        self.given: set[str] = set()

    def started(self, run: RunInfo) -> None: ...
    def evaluated(self, report: EvalReport) -> None: ...

    def stepped(self, report: StepReport) -> None:
        notes = (score.note for group in report.groups for score in group.scores if score.value is None and score.note)
        for text in self.step(report.metrics, next(notes, "")):
            self.warn(f"step {report.metrics['step']}: {text}")

    def warned(self, text: str) -> None: ...
    def finished(self, summary: Mapping[str, Any] | None) -> None: ...

    def state(self) -> dict[str, Any]:
        """What was counted and said so far, as JSON."""
        return {
            "quiet_steps": self.quiet_steps,
            "first_mismatch": self.first_mismatch,
            "given": sorted(self.given),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError, TypeError or KeyError for what `state` does not give."""
        mismatch = state["first_mismatch"]
        self.quiet_steps = as_count(state["quiet_steps"])
        self.first_mismatch = None if mismatch is None else as_number(mismatch)
        self.given = set(map(str, state["given"]))

    def step(self, metrics: Mapping[str, Any], note: str = "") -> list[str]:
        """What is to be said after this step, each kind of thing at most once a run. `note`: why one was not judged."""
        found = {}
        if (metrics.get("unjudged") or 0.0) > UNJUDGED_SHARE:
            found["unjudged"] = f"{metrics['unjudged']:.0%} of the samples were not judged, and teach nothing" + (
                f": {note}" if note else ""
            )
        if self.answered and metrics["step"] == 1 and metrics["turns"] == 1:
            found["alone"] = (
                "the environment has not answered once: no turn ended where it is asked (the model's end of turn, or "
                "environment.stop), or there was nothing to say; dppo sample shows what the model writes"
            )
        masked = [m for m in (metrics["masked_positive"], metrics["masked_negative"]) if m is not None]
        # Of samples from earlier steps it is not a matter of the engine.
        mismatch = None if metrics.get("staleness") else metrics["mismatch_mean"]
        if masked:
            self.quiet_steps = 0 if max(masked) > 0 else self.quiet_steps + 1
            if self.masks and self.quiet_steps >= QUIET_STEPS:
                found["quiet"] = (
                    f"no token was masked for {QUIET_STEPS} steps: the policy never reaches the edge of its trust "
                    "region"
                )
            if max(masked) > BUSY_SHARE:
                found["busy"] = (
                    f"{max(masked):.0%} of the tokens of one sign are masked: lower optim.lr or the number of updates "
                    "per rollout, or widen the trust region; see masked_tokens.json for which tokens"
                )
        if (metrics.get("filtered") or 0.0) > FILTERED_SHARE:
            found["filtered"] = (
                f"the off-policy filter dropped {metrics['filtered']:.0%} of the tokens: widen its bounds, or lower "
                "optim.lr or the number of updates per rollout"
            )
        if mismatch is not None:
            if self.first_mismatch is None:
                self.first_mismatch = mismatch
                if mismatch > LARGE_MISMATCH:
                    found["mismatch"] = (
                        f"before any update the rollout engine and the trainer differ by {mismatch:.3f} in mean "
                        "|pi-mu|: check temperature, precision and chat template on both sides"
                    )
            elif mismatch > NOISE and mismatch > GROWTH * self.first_mismatch:
                found["growth"] = (
                    f"the mismatch between rollout engine and trainer grew from {self.first_mismatch:.4f} to "
                    f"{mismatch:.4f} in mean |pi-mu|"
                )
        new = [text for kind, text in found.items() if kind not in self.given]
        self.given.update(found)
        return new
