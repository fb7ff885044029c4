"""Warnings about the trust region: what each needs, and that it is given once in a run."""

import json
from typing import Any

import make
import pytest

from dppo_cli.telemetry.watch import BUSY_SHARE, GROWTH, LARGE_MISMATCH, NOISE, QUIET_STEPS, Watch
from dppo_cli.types import Group, Score, StepReport


def watching(masks: bool = True) -> Watch:
    """One whose `step` says what there is to say; only `stepped` warns."""
    return Watch(masks, warn=make.fail)


def metrics(
    positive: float | None = 0.01, negative: float | None = 0.01, mismatch: float | None = 1e-3
) -> dict[str, Any]:
    return {"masked_positive": positive, "masked_negative": negative, "mismatch_mean": mismatch}


def said(watch: Watch, *steps: dict[str, Any]) -> list[list[str]]:
    return [watch.step(step) for step in steps]


def test_an_ordinary_run_is_left_in_peace():
    assert said(watching(), *[metrics()] * 100) == [[]] * 100


def test_a_region_that_masks_nothing_is_named_after_the_thirtieth_step_and_once():
    found = said(watching(), *[metrics(0.0, 0.0)] * (2 * QUIET_STEPS))
    assert QUIET_STEPS == 30
    assert found[: QUIET_STEPS - 1] == [[]] * (QUIET_STEPS - 1)
    assert len(found[QUIET_STEPS - 1]) == 1 and "no token was masked for 30 steps" in found[QUIET_STEPS - 1][0]
    assert found[QUIET_STEPS:] == [[]] * QUIET_STEPS


@pytest.mark.parametrize("awake", [metrics(0.01, 0.0), metrics(0.0, 0.01), metrics(0.01, None)])
def test_one_masked_token_of_either_sign_starts_the_count_again(awake):
    quiet = [metrics(0.0, 0.0)] * (QUIET_STEPS - 1)
    assert said(watching(), *quiet, awake, *quiet) == [[]] * (2 * QUIET_STEPS - 1)


def test_a_filter_that_drops_much_is_named_once():
    watch = watching()
    assert said(watch, metrics() | {"filtered": 0.3}, metrics() | {"filtered": None}) == [[], []]
    (text,) = watch.step(metrics() | {"filtered": 0.31})
    assert text.startswith("the off-policy filter dropped 31% of the tokens") and "widen its bounds" in text
    assert watch.step(metrics() | {"filtered": 0.9}) == []


def test_an_environment_that_is_not_asked_in_the_first_step_is_named():
    first, later = ({**metrics(), "step": step, "turns": 1.0} for step in (1, 2))
    watch = Watch(True, make.fail, answered=True)
    (text,) = watch.step(first)
    assert text.startswith("the environment has not answered once") and watch.step(later) == []
    assert Watch(True, make.fail, answered=True).step({**first, "turns": 1.1}) == watching().step(first) == []
    assert Watch(True, make.fail, answered=True).step(later) == [], "it may have learnt to do without"


def test_steps_without_tokens_are_not_counted_as_quiet():
    found = said(watching(), *[metrics(None, None, None)] * 100, *[metrics(0.0, None)] * QUIET_STEPS)
    assert found[:-1] == [[]] * (99 + QUIET_STEPS)
    assert len(found[-1]) == 1


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_region_that_masks_much_of_one_sign(side):
    watch = watching()
    assert watch.step(metrics(**{side: BUSY_SHARE})) == []
    (text,) = watch.step(metrics(**{side: 0.41}))
    assert text.startswith("41% of the tokens of one sign are masked") and "widen the trust region" in text
    assert watch.step(metrics(**{side: 0.9})) == []


def test_a_large_mismatch_at_the_start():
    (text,) = watching().step(metrics(mismatch=0.0312))
    assert "0.031 in mean |pi-mu|" in text and "temperature" in text
    assert watching().step(metrics(mismatch=LARGE_MISMATCH)) == []


def test_samples_of_earlier_steps_show_no_mismatch_of_engines():
    watch = watching()
    assert said(watch, metrics(mismatch=0.001), {**metrics(mismatch=0.5), "staleness": 1.0}) == [[], []]
    assert watch.first_mismatch == 0.001
    assert watching().step({**metrics(mismatch=0.5), "staleness": 1.0}) == []


def test_only_the_first_mismatch_is_a_start():
    # 0.021 after 0.019 is large but neither the start nor growth.
    assert said(watching(), metrics(mismatch=None), metrics(mismatch=0.019), metrics(mismatch=0.021)) == [
        [],
        [],
        [],
    ]


def test_a_growing_mismatch_is_measured_against_the_first():
    watch = watching()
    start = 0.004
    assert said(watch, *(metrics(mismatch=m) for m in (start, 2 * start, GROWTH * start))) == [[], [], []]
    (text,) = watch.step(metrics(mismatch=0.0125))
    assert "grew from 0.0040 to 0.0125" in text
    assert watch.step(metrics(mismatch=0.9)) == []


def test_growth_within_rounding_is_not_mentioned():
    assert said(watching(), metrics(mismatch=0.0), metrics(mismatch=NOISE), metrics(mismatch=0.9 * NOISE)) == [
        [],
        [],
        [],
    ]
    found = said(watching(), metrics(mismatch=0.0), metrics(mismatch=1.1 * NOISE))
    assert len(found[1]) == 1 and "grew" in found[1][0]


def test_two_things_at_once_are_both_said():
    found = watching().step(metrics(positive=0.5, mismatch=0.5))
    assert len(found) == 2
    assert any("masked" in text for text in found) and any("mismatch" in text or "differ" in text for text in found)


def test_an_objective_that_never_masks_is_not_told_that_nothing_was_masked() -> None:
    assert said(watching(masks=False), *[metrics(0.0, 0.0)] * (2 * QUIET_STEPS)) == [[]] * (2 * QUIET_STEPS)


def test_a_step_is_warned_of_with_its_number() -> None:
    warned: list[str] = []
    watch = Watch(masks=True, warn=warned.append)
    for number, values in enumerate([metrics(), metrics(positive=0.5, mismatch=0.5), metrics(positive=0.5)], start=7):
        watch.stepped(StepReport({**values, "step": number}, [], []))
    assert [text.partition(" of")[0].partition(" grew")[0] for text in warned] == [
        "step 8: 50%",
        "step 8: the mismatch between rollout engine and trainer",
    ]


RUNS = {
    "quiet": [metrics(0.0, 0.0)] * (2 * QUIET_STEPS),
    "busy": [metrics(), metrics(positive=0.5), metrics(positive=0.9)],
    "large mismatch": [metrics(mismatch=0.5), metrics(mismatch=0.5), metrics(mismatch=0.6)],
    "growing mismatch": [
        metrics(mismatch=0.004),
        metrics(mismatch=0.006),
        metrics(mismatch=0.02),
        metrics(mismatch=0.9),
    ],
    "late mismatch": [metrics(mismatch=None), metrics(mismatch=0.004), metrics(mismatch=0.1), metrics(mismatch=0.2)],
    "everything": [metrics(0.0, 0.0, 0.5)] * QUIET_STEPS + [metrics(0.9, 0.9, 5.0)] * 3,
}


@pytest.mark.parametrize("steps", RUNS.values(), ids=list(RUNS))
def test_a_resumed_watch_goes_on_as_if_undisturbed(steps: list[dict[str, Any]]) -> None:
    """Wherever the run is cut: it counts on, measures against the first step, and repeats nothing."""
    whole = said(watching(), *steps)
    assert any(whole)
    for cut in range(len(steps) + 1):
        before, after = watching(), watching()
        first = said(before, *steps[:cut])
        after.load_state(json.loads(json.dumps(before.state())))
        assert first + said(after, *steps[cut:]) == whole


def test_a_reward_that_judges_next_to_nothing_is_told_once() -> None:
    warned: list[str] = []
    watch = Watch(masks=True, warn=warned.append)
    scores = [Score(None), Score(None, note="the row has no tests"), Score(1.0)]
    groups = [Group(make.prompt(), [make.completion()] * 3, scores)]
    for number, share in ((1, 0.5), (2, 2 / 3), (3, 1.0)):
        watch.stepped(StepReport({**metrics(), "step": number, "unjudged": share}, groups, []))
    assert warned == ["step 2: 67% of the samples were not judged, and teach nothing: the row has no tests"]
