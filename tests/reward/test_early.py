"""Rewards that are judged elsewhere begin while the engine samples, and give what they give in one call."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import make
import pytest
from functions import alive, function, values
from judges import Server, option, said

from dppo_cli.config.sections import Sampling
from dppo_cli.errors import RewardError
from dppo_cli.reward.exact import Exact
from dppo_cli.reward.judge import JudgeScorer
from dppo_cli.reward.math_answer import Math
from dppo_cli.reward.mixture import MixtureScorer
from dppo_cli.reward.pooled import PooledScorer
from dppo_cli.reward.scorer import EarlyScorer, Scorer
from dppo_cli.rollout.collect import Scored, sample_and_score
from dppo_cli.training.evaluation import evaluate
from dppo_cli.types import Completion

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=8, stop=[])
SECONDS = 60.0
"""A test that waits longer for what should happen in the background has failed."""


class Engine:
    """Responses of these texts; prompts end in `order`. `between(n)` is called when n of them have been handed out."""

    def __init__(
        self, *texts: Sequence[str], order: Sequence[int] = (), between: Callable[[int], object] = lambda _: None
    ) -> None:
        self.texts, self.between = texts, between
        self.order = order or range(len(texts))
        self.handed_out: list[int] = []

    def generate(self, *_: object) -> Iterator[tuple[int, list[Completion]]]:
        for number in self.order:
            self.handed_out.append(number)
            yield number, [make.completion(text=text) for text in self.texts[number]]
            self.between(len(self.handed_out))


def collected(engine: Any, scorer: Scorer) -> Scored:
    prompts = [make.prompt(i, answer=str(i)) for i in range(len(engine.texts))]
    return sample_and_score(engine, scorer, prompts, 2, SAMPLING, 0, seed=1)


def math(warn: Callable[[str], None] = make.fail, **changes: Any) -> PooledScorer:
    fields = {"boxed_only": False, "timeout": SECONDS, "default": 0.0, "workers": 2, "memory_gib": 4.0, **changes}
    scorer = Math(**fields).load(warn)
    assert isinstance(scorer, PooledScorer)
    return scorer


# That they begin


def test_a_judge_is_asked_while_the_others_are_sampled(server: Server) -> None:
    asked = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Any:
        asked.set()
        return said("Verdict: yes")

    server.reply = reply
    engine = Engine(["a", "b"], ["c", "d"], between=lambda n: n > 1 or asked.wait(SECONDS) or pytest.fail("not asked"))
    assert values(collected(engine, option(server.url).load(make.fail)).scores) == [[1.0, 1.0]] * 2
    assert len(server.bodies) == 4


def test_workers_score_while_the_others_are_sampled() -> None:
    scorer = math()

    def scored(handed_out: int) -> None:
        assert len(scorer.begun) == 2 * handed_out
        for _, call in scorer.begun.values():
            assert "rewards" in call.result(SECONDS)

    engine = Engine(["0", "1"], ["no", "1"], ["2", "2"], order=(2, 0, 1), between=scored)
    assert values(collected(engine, scorer).scores) == [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    assert engine.handed_out == [2, 0, 1] and not scorer.begun


def test_an_evaluation_begins_early_too(server: Server) -> None:
    asked = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Any:
        asked.set()
        return said("Verdict: " + ("yes" if "right" in str(body["messages"]) else "no"))

    server.reply = reply
    engine: Any = Engine(
        *(["right"], ["wrong"], ["right"]),
        order=(1, 2, 0),
        between=lambda n: n > 2 or asked.wait(SECONDS) or pytest.fail("not asked"),
    )
    judge = option(server.url, template="{completion}").load(make.fail)
    result = evaluate(engine, [make.prompt(i) for i in range(3)], judge, SAMPLING, 1, 1.0, seed=1)
    assert [[score.value for score in group.scores] for group in result.groups] == [[1.0], [0.0], [1.0]]
    assert [group.prompt.index for group in result.groups] == [0, 1, 2]


# What must be called with all, or is too fast for it to matter


def test_a_function_gets_a_step_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the prompts, whatever ended first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def position(completions, **_): return [float(i) for i in range(len(completions))]\n"
        "def size(completions, **_): return [float(len(completions))] * len(completions)\n"
    )
    engine = Engine(["a", "b"], ["c"], ["d", "e", "f"], order=(1, 2, 0))
    both = function(["mine.py:position", "mine.py:size"], weights=[1.0, 0.0]).load(make.fail)
    found = collected(engine, both).scores
    assert values(found) == [[0.0, 1.0], [2.0], [3.0, 4.0, 5.0]]
    assert {score.parts["size"] for group in found for score in group} == {6.0}


def test_a_mixture_begins_with_the_members_that_can(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def size(completions, **_): return [float(len(completions))] * len(completions)\n"
    )
    judge, whole = option(server.url).load(make.fail), function("mine.py:size").load(make.fail)
    members = {"judge": judge, "size": whole, "exact": Exact(None).load(make.fail)}
    asked: list[int] = []
    engine = Engine(["0"], ["no"], between=lambda _: asked.append(len(judge.asked) + len(judge.scores)))
    found = collected(engine, MixtureScorer(members, {})).scores
    assert asked == [1, 2]
    assert [dict(score.parts) for (score,) in found] == [
        {"judge": 1.0, "size": 2.0, "exact": 1.0},
        {"judge": 1.0, "size": 2.0, "exact": 0.0},
    ]
    assert not isinstance(members["exact"], EarlyScorer)


# That nothing else changes


def outcome(begins: bool, scorer: Any, *texts: Sequence[str]) -> Any:
    """Scores, or the error, of a step that is scored as it is sampled, or afterwards."""
    try:
        return collected(Engine(*texts), scorer if begins else lambda *of: scorer(*of)).scores
    except RewardError as error:
        return str(error)


@pytest.mark.parametrize(
    ("max_failures", "steps", "warned"), [(2, 1, ["1"]), (3, 2, ["1", "2", "3", "4"] * 2)], ids=["ends", "goes on"]
)
def test_a_judge_counts_its_failures_as_in_one_call(
    server: Server, max_failures: int, steps: int, warned: list[str]
) -> None:
    """In a row over the groups and steps, with the same warnings."""
    server.reply = lambda body, number: said("Verdict: yes" if "good" in str(body["messages"]) else "hm")
    found = []
    for begins in (True, False):
        warnings: list[str] = []
        judge = option(server.url, max_failures=max_failures, template="{completion}").load(warnings.append)
        texts = ["good a", "1"], ["2", "good b"], ["good c", "3"], ["4"]
        found.append(([outcome(begins, judge, *texts) for _ in range(steps)], warnings))
    assert found[0] == found[1]
    scores, warnings = found[0]
    assert [text.partition("('")[2].partition("'")[0] for text in warnings] == warned
    if steps == 1:
        assert scores[0].endswith("no verdict: 'hm'; that is reward.max_failures=2 times in a row")
    else:
        assert [values(of) for of in scores] == [[[1.0, None], [None, 1.0], [1.0, None], [None]]] * 2


def test_equal_requests_of_a_step_are_sent_once_and_those_of_the_next_again(server: Server) -> None:
    judge = option(server.url, template="{completion}").load(make.fail)
    for step in (1, 2):
        assert values(collected(Engine(["a", "b"], ["b", "a"]), judge).scores) == [[1.0, 1.0]] * 2
        assert len(server.bodies) == 2 * step


def test_samples_that_are_killed_are_told_of_once_a_step() -> None:
    deep = r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}"
    found = []
    for begins in (True, False):
        warnings: list[str] = []
        scores = outcome(begins, math(warnings.append, timeout=2.0), [deep, "0"], ["1", deep])
        found.append((values(scores), warnings))
    assert found[0] == found[1]
    assert found[0][0] == [[0.0, 1.0], [1.0, 0.0]]
    (warning,) = found[0][1]
    assert "failed on problem 0 ('" in warning and warning.endswith(" (and on 1 more of 4 samples); scored as 0.0")


# That it ends


def test_a_judge_that_refuses_ends_the_sampling(server: Server) -> None:
    server.reply = lambda body, number: (401, {}, {"error": "who are you?"})
    judge = option(server.url).load(make.fail)

    def answered(_: int) -> None:
        for answer, _pair in list(judge.asked.values()):
            assert isinstance(answer.exception(SECONDS), RewardError)

    engine = Engine(["a"], ["b"], ["c"], ["d"], between=answered)
    with pytest.raises(RewardError, match="refuses: it answered 401 who are you"):
        collected(engine, judge)
    assert engine.handed_out == [0, 1], "no further prompt is waited for"
    assert judge.client.ended.is_set()


def test_the_cost_cap_ends_the_sampling(server: Server) -> None:
    judge = option(server.url, max_requests=2, concurrency=1).load(make.fail)

    def answered(_: int) -> None:
        for answer, _pair in list(judge.asked.values()):
            answer.exception(SECONDS)

    engine = Engine(["a"], ["b"], ["c"], ["d"], ["e"], between=answered)
    with pytest.raises(RewardError, match=r"was asked reward\.max_requests=2 times; raise it to go on"):
        collected(engine, judge)
    assert engine.handed_out == [0, 1, 2, 3] and len(server.bodies) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_sampling_that_is_cut_short_leaves_no_worker_busy(error: type[BaseException]) -> None:
    """Or the interpreter would wait for it when it exits."""
    deep = r"\boxed{9^{9^{9^9}}}"
    scorer = math(timeout=3600.0, workers=1)
    (worker,) = scorer.pool.others

    def interrupted(n: int) -> None:
        if n == 2:
            raise error

    before = [*scorer.pool.threads._threads]
    assert alive(worker.process.pid) and before == []
    with pytest.raises(error):
        collected(Engine([deep, deep], ["1", "1"], ["2"], between=interrupted), scorer)
    assert not alive(worker.process.pid) and not scorer.begun
    assert values(collected(Engine(["0", "no"]), scorer).scores) == [[1.0, 0.0]], "with a worker of its own"


def test_a_judge_is_given_up_when_sampling_is_cut_short(server: Server) -> None:
    let_go = threading.Event()
    server.reply = lambda body, number: (let_go.wait(SECONDS), said("Verdict: yes"))[1]
    judge = option(server.url, concurrency=1, timeout=SECONDS).load(make.fail)
    calls = []

    def interrupted(_: int) -> None:
        calls.extend(answer for answer, _pair in judge.asked.values())
        raise KeyboardInterrupt

    assert isinstance(judge, JudgeScorer)
    with pytest.raises(KeyboardInterrupt):
        collected(Engine(["a", "b", "c"], between=interrupted), judge)
    let_go.set()
    assert len(calls) == 3 and [call.cancelled() for call in calls[1:]] == [True, True]
    assert judge.client.ended.is_set() and not judge.asked


def test_the_trainer_waits_for_scoring_only_while_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling takes 10 s a group, beginning 1 s, and the rest of the scores 5 s."""
    clock = [0.0]
    monkeypatch.setattr("dppo_cli.rollout.collect.time.perf_counter", lambda: clock[0])

    def passes(seconds: float) -> None:
        clock[0] += seconds

    class Slow:
        def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[Any]]:
            passes(5.0)
            return [[] for _ in prompts]

        def begin(self, prompt: Any, completions: Any) -> None:
            passes(1.0)

        def give_up(self) -> None:
            pytest.fail("nothing failed")

    engine = Engine(["a"], ["b"], ["c"], between=lambda _: passes(10.0))
    assert collected(engine, Slow()).seconds == {"rollout": 30.0, "reward": 8.0}
