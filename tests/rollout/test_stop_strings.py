"""Texts that end a response."""

import make
import pytest
import tiny
import torch
from engines import sampling
from helpers import read_json, train

from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.stop_strings import StopStrings, before_first
from dppo_cli.types import Completion, Status


def generated(policy: Policy, *stop: str, length: int = 30) -> list[Completion]:
    how = sampling(length)
    object.__setattr__(how, "stop", list(stop))
    with LocalRollout("auto", None, 512, 8).load(policy, make.fail) as engine:
        engine.sync(0)
        return make.flat(in_order(engine.generate(make.prompts(policy), 8, how, 0, seed=4)))


def test_a_response_ends_with_the_token_that_completes_the_text(train_config):
    policy = make.policy(train_config())
    free, stopped = generated(policy), generated(policy, "e", "7x")
    ended = 0
    for long, short in zip(free, stopped, strict=True):
        ids = short.token_ids_T.tolist()
        assert ids == long.token_ids_T[: len(ids)].tolist(), "nothing else changes"
        torch.testing.assert_close(short.mu.logp_N, long.mu.logp_N[: len(ids)], rtol=1e-5, atol=1e-5)
        raw = policy.decode(ids)
        if "e" in raw or "7x" in raw:
            ended += 1
            assert short.status is Status.FINISHED
            assert raw.endswith(("e", "7x")) and short.text == before_first(raw, ["e", "7x"])
            assert "e" not in policy.decode(ids[:-1])
        else:
            assert (short.text, short.status, len(ids)) == (raw, long.status, len(long.token_ids_T))
    assert 5 < ended < len(free)


def test_a_text_of_several_tokens(train_config):
    policy = make.policy(train_config())
    pairs = {c.text[i : i + 2] for c in generated(policy) for i in range(len(c.text) - 1)}
    stop = min(pairs)
    found = [c for c in generated(policy, stop) if c.status is Status.FINISHED and c.token_ids_T[-1] != 1]
    assert found and all(policy.decode(c.token_ids_T.tolist()).endswith(stop) for c in found)
    assert all(stop not in c.text for c in found)


def test_a_special_token_can_be_the_text(train_config):
    """`<unk>` shows in no decoded response."""
    policy = make.policy(train_config())
    found = generated(policy, "<unk>", length=200)
    unknown = [c for c in found if 2 in c.token_ids_T.tolist()]
    assert unknown and all(c.token_ids_T[-1] == 2 and c.status is Status.FINISHED for c in unknown)


def test_only_tokens_with_the_last_character_are_looked_at():
    stops = StopStrings(["ab", "7"], tiny.tokenizer())
    characters = [tiny.CHARACTERS[i - 3] if i >= 3 else "" for i in stops.completes_V.nonzero().squeeze(-1).tolist()]
    assert {"b", "7"} <= set(characters) and "a" not in characters
    assert StopStrings([" "], tiny.tokenizer()).completes_V.all()
    ids = [[tiny.CHARACTERS.index(c) + 3 for c in text] for text in ("xab", "xxb", "x7a", "xx7")]
    assert stops.ended(torch.tensor(ids), torch.arange(4)).tolist() == [True, False, False, True]
    assert stops.ended(torch.tensor(ids), torch.tensor([3, 1])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [("xabx", 0, 3), ("xabx", 2, 3), ("xabx", 3, None), ("ab7", 0, 2), ("ab7", 2, 3), ("xx", 0, None), ("", 0, None)],
)
def test_where_a_sequence_first_ends(text, start, expected):
    ids = [tiny.CHARACTERS.index(c) + 3 for c in text]
    assert StopStrings(["ab", "7"], tiny.tokenizer()).first_end(ids, start) == expected
    assert StopStrings(["ab"], tiny.tokenizer()).first_end([*ids, 5000], len(ids)) is None, "beyond the tokenizer"


@pytest.mark.parametrize(("text", "expected"), [("a;b.c", "a"), ("ab.c;", "ab"), ("abc", "abc"), (";", ""), ("", "")])
def test_the_text_before_the_first(text, expected):
    assert before_first(text, [".", ";"]) == expected


@pytest.mark.usefixtures("work")
def test_the_reward_sees_the_text_before_the_stop(model, work, capsys):
    source = "def f(prompts, completions, **_):\n"
    source += "    assert not any(set('eax179') & set(c) for c in completions), completions\n"
    source += "    return [float(len(c)) for c in completions]\n"
    (work / "mine.py").write_text(source)
    words = ["sampling.max_new_tokens=12", "reward.path=mine.py:f", "run_dir=run", "steps=1"]
    assert train(model, *words) == 2
    assert "the reward function" in capsys.readouterr().err
    assert train(model, *words, "sampling.stop=[e,a,x,'1','7','9']") == 0
    assert read_json(work / "run/summary.json")["steps"] == 1
