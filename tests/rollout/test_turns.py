"""Responses of several turns: what the model sampled is what the trainer sees, what was said in between is not."""

from collections.abc import Iterator, Sequence
from typing import Any

import make
import pytest
import torch
import vllm_cases
from conversations import BOUND, PLAIN, STOPS, Replies, always, generate, parts
from engines import ROUNDING, TEMPERATURE, opened, sampling, trained
from refills import check_equal, refilled

from dppo_cli.algorithm.advantage import GroupMean
from dppo_cli.config.sections import BatchPlan, Prompting
from dppo_cli.environment.environment import Reply
from dppo_cli.errors import ModelError, ReplyError
from dppo_cli.rollout.collect import InStepCollector
from dppo_cli.rollout.engine import derive_seed, in_order
from dppo_cli.rollout.turns import Conversation, TurnsEngine, _in_parts
from dppo_cli.types import Completion, Messages, Prompt, Score, Status


def test_each_turn_is_sampled_as_a_response_to_all_before(policy) -> None:
    prompts, environment = make.prompts(policy), always("1+2=", turn_tokens=8)
    completions = generate(policy, environment, prompts)
    reply = policy.tokenizer("1+2=")["input_ids"]
    several = [(p, g, parts(c)) for p, row in enumerate(completions) for g, c in enumerate(row) if len(parts(c)) > 1]
    assert len(several) >= 4
    with opened(policy) as engine:
        for p, g, found in several:
            context = list(prompts[p].token_ids)
            for turn, (sampled, ids) in enumerate(found[1:], 1):
                context += found[turn - 1][1]
                if not sampled:
                    assert ids == reply
                    continue
                number = turn // 2
                seed, of = derive_seed(3, f"turn {number}"), [Prompt(0, prompts[p].example, tuple(context))]
                (again,) = make.flat(in_order(engine.generate(of, 1, sampling(8), 0, seed, [3 * p + g])))
                assert again.token_ids_T.tolist() == ids


@pytest.mark.parametrize("num_logprobs", [0, 4])
def test_mu_is_what_the_trainer_computes(policy, num_logprobs: int) -> None:
    prompts = make.prompts(policy)
    completions = generate(policy, always("12+34=", turn_tokens=8), prompts, num_logprobs=num_logprobs)
    assert sum(len(parts(c)) > 1 for row in completions for c in row) >= 4
    mu = torch.cat([c.mu.logp_N for row in completions for c in row])
    torch.testing.assert_close(trained(policy, prompts, completions), mu, **ROUNDING)
    for c in make.flat(completions):
        assert (c.mu.topk_ids_NK is None) == (num_logprobs == 0)
        assert c.mu.topk_ids_NK is None or c.mu.topk_ids_NK.shape == (int(c.sampled_T.sum()), num_logprobs)


@pytest.mark.parametrize("how", [{}, {"role": "assistant", "stop": list(STOPS)}], ids=["beside", "inside"])
def test_turns_in_slots_that_are_filled_again(policy, how) -> None:
    """As on a GPU; slots have room for the contexts of later turns."""
    prompts = make.prompts(policy)
    with refilled(policy) as inner:
        turns = TurnsEngine(inner, always("1+2=", turn_tokens=12, **how), policy, PLAIN)
        found = in_order(turns.generate(prompts, 3, sampling(BOUND), 4, 3))
    assert sum(len(parts(c)) > 1 for c in make.flat(found)) >= 4
    check_equal(found, generate(policy, always("1+2=", turn_tokens=12, **how), prompts, num_logprobs=4))


def test_turns_of_a_vllm_server(adapted, server) -> None:
    """The same through requests: the server is asked for one sample of each context."""
    prompts = make.prompts(adapted)
    environment = always("12+34=", stop=list(STOPS), turn_tokens=20)
    with vllm_cases.opened(adapted, server) as inner:
        turns = TurnsEngine(inner, environment, adapted, PLAIN)
        found = in_order(turns.generate(prompts, 3, sampling(BOUND, temperature=TEMPERATURE), 0, 3))
    assert sum(len(parts(c)) > 1 for c in make.flat(found)) >= 4
    mu = torch.cat([c.mu.logp_N for c in make.flat(found)])
    torch.testing.assert_close(trained(adapted, prompts, found), mu, **ROUNDING)
    asked = [body["n"] for body in server.bodies("/completions")[2:]]
    assert asked[: len(prompts)] == [3] * len(prompts) and set(asked[len(prompts) :]) == {1}


def test_what_was_said_comes_as_messages(policy) -> None:
    environment = Replies(lambda problem, said, turn: f"{turn}+{problem}=" if turn < 2 else None, turn_tokens=8)
    completions = generate(policy, environment, make.prompts(policy))
    for problem, row in enumerate(completions):
        for c in row:
            runs = parts(c)
            texts = [policy.decode(ids) for _, ids in runs]
            assert c.text == texts[-1] and c.said[-1] == {"role": "assistant", "content": c.text}
            assert [m["content"] for m in c.said] == texts
            assert bool(c.messages) == (len(runs) > 1)
            if len(runs) > 1:
                assert runs[1] == (False, policy.tokenizer(f"1+{problem}=")["input_ids"])
    once, twice = ([a for a in environment.asked if a[2] == turn] for turn in (1, 2))
    assert len(once) > len(twice) > 0
    assert all([m["role"] for m in said] == ["assistant", "user", "assistant"] for _, said, _ in twice)


def test_tokens_depend_on_nothing_but_the_problem_and_its_number(policy) -> None:
    prompts = make.prompts(policy)
    reply = lambda problem, said, turn: "7+" if len(said[-1]["content"]) % 2 else None  # noqa: E731
    whole = generate(policy, Replies(reply), prompts, how=sampling(30))
    assert any(c.messages for c in make.flat(whole))
    for engine in ({"concurrent_sequences": 1}, {"concurrent_sequences": 5}):
        assert make.tokens(generate(policy, Replies(reply), prompts, how=sampling(30), **engine)) == make.tokens(whole)
    some = generate(policy, Replies(reply), [prompts[3], prompts[1]], how=sampling(30), numbers=[3, 1])
    assert make.tokens(some) == make.tokens([whole[3], whole[1]])


def test_a_response_keeps_to_its_limits(policy) -> None:
    prompts = make.prompts(policy)
    seen = set()
    for most, turn_tokens in ((12, None), (20, 5), (60, 12)):
        environment = always("=", turns=4, turn_tokens=turn_tokens)
        found = make.flat(generate(policy, environment, prompts, group=6, how=sampling(most)))
        for c in found:
            runs = [len(ids) for sampled, ids in parts(c) if sampled]
            assert len(c.token_ids_T) <= most and len(runs) <= 4 and max(runs) <= (turn_tokens or most)
            assert c.sampled_T[0] and c.sampled_T[-1], "nothing is said that the model does not answer"
            ended = c.token_ids_T[-1].item() in policy.eos_ids
            assert c.status is (Status.FINISHED if ended and c.status is not Status.CUT else Status.CUT)
        seen |= {c.status for c in found}
    assert seen == {Status.FINISHED, Status.CUT}


def test_a_reply_that_does_not_fit_ends_the_response_as_cut(policy) -> None:
    found = make.flat(generate(policy, always("1" * 30), make.prompts(policy), how=sampling(20)))
    assert all(len(parts(c)) == 1 and c.status is Status.CUT and not c.messages for c in found)


def test_the_last_turn_is_not_answered(policy) -> None:
    environment = always("1+1=", turns=2, turn_tokens=10)
    found = make.flat(generate(policy, environment, make.prompts(policy)))
    assert {turn for _, _, turn in environment.asked} == {1} and max(len(parts(c)) for c in found) == 3


# What the loop sees


def test_a_broken_environment_leaves_its_sample_out(policy) -> None:
    environment = Replies(lambda problem, said, turn: Reply(failed="it hung") if problem == 1 else None)

    def scorer(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [[Score(float(i)) for i in range(len(row))] for row in completions]

    with opened(policy) as inner:
        turns = TurnsEngine(inner, environment, policy, PLAIN)
        collector = InStepCollector(turns, scorer, GroupMean(), BatchPlan(4, 3, 4, 1), sampling(BOUND), 0, 5, False)
        prompts = make.prompts(policy)
        groups = collector.collect(lambda count: prompts[:count], 1).groups
    for group in groups:
        for completion, score, advantage in zip(group.completions, group.scores, group.advantages, strict=True):
            broken = completion.status is Status.ABORTED
            assert not broken or (score.value is None and score.note and advantage == 0.0)
            assert broken == (group.prompt.index == 1 and completion.token_ids_T[-1].item() in policy.eos_ids)
    assert any(c.status is Status.ABORTED for c in groups[1].completions)


class Lazy:
    """An engine whose samples come one after the other. `log`: what happened, in its order."""

    samples_with = "nothing"

    def __enter__(self) -> "Lazy":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("closed")

    def __init__(self, log: list[str], lose: bool = False) -> None:
        self.log, self.lose = log, lose

    def generate(self, prompts: Sequence[Prompt], count: int, *how: Any) -> Iterator[tuple[int, list[Completion]]]:
        self.log.append(f"begun {len(prompts)}")

        def groups() -> Iterator[tuple[int, list[Completion]]]:
            for number in reversed(range(len(prompts))):
                self.log.append(f"sampled {prompts[number].index}")
                lost = self.lose and count == 1
                yield number, [] if lost else [make.completion((5, 1), text=f"of {prompts[number].index}")] * count

        return groups()


def test_it_begins_when_it_is_called_and_asks_while_others_are_sampled(policy) -> None:
    log: list[str] = []

    def reply(problem: int, said: Messages, turn: int) -> str | None:
        log.append(f"asked {problem}")
        return "1+1=" if problem == 1 else None

    turns = TurnsEngine(Lazy(log), Replies(reply), policy, PLAIN)  # type: ignore[arg-type]
    generated = turns.generate(make.prompts(policy)[:3], 1, sampling(BOUND), 0, 3)
    assert log == ["begun 3"]
    numbers = [number for number, _ in generated]
    assert log[:7] == ["begun 3", "sampled 2", "asked 2", "sampled 1", "asked 1", "sampled 0", "asked 0"]
    assert log[7:10] == ["begun 1", "sampled 1", "asked 1"]
    assert sorted(numbers) == [0, 1, 2] and numbers[-1] == 1, "what is over comes before the next turn"


def test_a_turn_that_the_engine_loses_aborts_the_response(policy) -> None:
    turns = TurnsEngine(Lazy([], lose=True), always("1+1="), policy, PLAIN)  # type: ignore[arg-type]
    (row,) = in_order(turns.generate(make.prompts(policy)[:1], 2, sampling(BOUND), 0, 3))
    assert [c.status for c in row] == [Status.ABORTED] * 2
    assert all([m["role"] for m in c.said] == ["assistant", "user"] and int(c.sampled_T.sum()) == 2 for c in row)


def test_calls_end_with_the_sampling(policy) -> None:
    def broken(problem: int, said: Messages, turn: int) -> str:
        raise ReplyError("no")

    environment = Replies(broken)
    with opened(policy) as inner, pytest.raises(ReplyError, match="no"):
        list(TurnsEngine(inner, environment, policy, PLAIN).generate(make.prompts(policy), 1, sampling(BOUND), 0, 3))
    assert environment.given_up == 1
    environment = always("1+1=")
    with TurnsEngine(Lazy([]), environment, policy, PLAIN) as engine:  # type: ignore[arg-type]
        generated = engine.generate(make.prompts(policy), 1, sampling(BOUND), 0, 3)
        next(generated)
        generated.close()  # type: ignore[attr-defined]
        assert environment.given_up == 1


def test_a_template_that_refuses_replies_is_told_at_the_start(policy) -> None:
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    chat = Prompting("chat", None, {}, "refuse")
    TurnsEngine(Lazy([]), always("x"), policy, chat)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no tools here"):
        TurnsEngine(Lazy([]), always("x", role="tool"), policy, chat)  # type: ignore[arg-type]


def test_the_calls_of_a_turn_fit_into_the_models_positions() -> None:
    sizes = [(3, 57), (40, 20), (41, 19), (55, 5), (9, 51), (10, 30)]
    going = []
    for number, (used, room) in enumerate(sizes):
        one = Conversation(make.prompt(number, range(3, 13)), number, room)
        one.token_ids.append(torch.arange(used))
        going.append(one)
    longest = max(10 + used + room for used, room in sizes)
    found = list(_in_parts(going, longest))
    assert sorted(one.number for part in found for one in part) == list(range(len(sizes))) and len(found) > 1
    for part in found:
        assert max(len(one.context()) for one in part) + max(one.room for one in part) <= longest
    assert len(list(_in_parts(going, 200))) == len(list(_in_parts(going, None))) == 1
