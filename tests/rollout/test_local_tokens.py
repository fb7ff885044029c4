"""The in-process engine: which tokens it samples, and where a response ends."""

import math
from collections.abc import Sequence
from dataclasses import replace

import make
import pytest
import tiny
import torch
from engines import ROUNDING, TEMPERATURE, generate, opened, sampling

from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import derive_seed, in_order
from dppo_cli.types import Prompt, Status

NO_EOS = (-1,)
architectures = pytest.mark.parametrize("architecture", list(tiny.CONFIGS))


@torch.no_grad()
def naive_generate(policy: Policy, prompts: Sequence[Prompt], group: int, length: int, seed: int) -> list[list[int]]:
    """Without cache, padding or batch: the whole sequence again for every token."""
    size = len(prompts) * group
    responses: list[list[int]] = [[] for _ in range(size)]
    generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in range(len(prompts))]
    for uniform_B in torch.cat([torch.rand(length, group, generator=g) for g in generators], 1):
        writing = [b for b in range(size) if not responses[b] or responses[b][-1] not in policy.eos_ids]
        if not writing:
            break
        for b in writing:
            ids = [*prompts[b // group].token_ids, *responses[b]]
            logits_V = policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double() / TEMPERATURE
            cdf_V = logits_V.softmax(-1).cumsum(-1)
            responses[b].append(int((cdf_V > float(uniform_B[b])).nonzero()[0]))
    return responses


@architectures
def test_tokens_are_those_of_a_naive_sampler(train_config, architecture):
    policy = replace(make.policy(train_config(model=architecture), adapter_scale=0.1), eos_ids=(1, *range(5, 20)))
    prompts = make.prompts(policy)[:3]
    found = generate(policy, prompts, 2, sampling(12), seed=11)
    expected = naive_generate(policy, prompts, 2, 12, seed=11)
    assert make.tokens(found) == expected
    assert len({len(response) for response in expected}) > 1, "sequences should end at different times here"


@pytest.mark.parametrize("concurrent_sequences", [1, 5, 512])
def test_tokens_do_not_depend_on_the_sub_batches(train_config, concurrent_sequences):
    policy = make.policy(train_config())
    prompts = make.prompts(policy)[:3]
    found = generate(policy, prompts, 2, sampling(6), seed=11, concurrent_sequences=concurrent_sequences)
    assert make.tokens(found) == naive_generate(policy, prompts, 2, 6, seed=11)
    assert [len(row) for row in found] == [2, 2, 2]


def test_the_same_prompt_twice_gets_other_tokens(train_config):
    policy = make.policy(train_config())
    prompt = make.prompts(policy)[0]
    first, second = generate(policy, [prompt, prompt], 2, sampling(6), seed=11)
    assert make.tokens([first]) != make.tokens([second])


def test_fewer_problems_get_the_same_tokens(train_config):
    policy = make.policy(train_config())
    prompts = make.prompts(policy)
    few = generate(policy, prompts[:2], 2, sampling(6), seed=11)
    assert make.tokens(few) == make.tokens(generate(policy, prompts, 2, sampling(6), seed=11)[:2])


@architectures
def test_a_token_does_not_depend_on_who_else_has_finished(train_config, architecture):
    policy = make.policy(train_config(model=architecture))
    prompts = make.prompts(policy)
    stopping, endless = replace(policy, eos_ids=(1, *range(5, 12))), replace(policy, eos_ids=NO_EOS)
    running = make.flat(generate(endless, prompts, 4, sampling(), seed=2))
    stopped = make.flat(generate(stopping, prompts, 4, sampling(), seed=2))
    lengths = [len(c.token_ids_T) for c in stopped]
    assert len(set(lengths)) > 4, "sequences should end at different times here"
    assert all(len(c.token_ids_T) == 20 and c.status is Status.CUT for c in running)
    for short, long, length in zip(stopped, running, lengths, strict=True):
        assert short.token_ids_T.tolist() == long.token_ids_T[:length].tolist()
        torch.testing.assert_close(short.mu.logp_N, long.mu.logp_N[:length], **ROUNDING)


def test_equal_seeds_give_equal_tokens_and_other_seeds_others(train_config):
    policy = make.policy(train_config())
    prompts = make.prompts(policy)
    with opened(policy) as engine:
        first = in_order(engine.generate(prompts, 3, sampling(), 0, seed=1))
        torch.manual_seed(99)  # the global generator is not asked
        again = in_order(engine.generate(prompts, 3, sampling(), 0, seed=1))
        other = in_order(engine.generate(prompts, 3, sampling(), 0, seed=2))
    assert make.tokens(again) == make.tokens(first)
    assert make.tokens(other) != make.tokens(first)
    assert make.tokens(first)[0] != make.tokens(first)[1], "samples of one prompt differ"


def test_responses_stop_at_any_end_of_sequence_token_and_keep_it(train_config):
    policy = replace(make.policy(train_config()), eos_ids=(1, 17, *range(20, 30)))
    completions = make.flat(generate(policy, make.prompts(policy), 8, sampling(10), seed=4))
    ends = set()
    for c in completions:
        ids = c.token_ids_T.tolist()
        finished = ids[-1] in policy.eos_ids
        assert not set(ids[:-1]) & set(policy.eos_ids)
        assert c.status is (Status.FINISHED if finished else Status.CUT)
        assert finished or len(ids) == 10
        assert len(ids) <= 10
        assert c.mu.logp_N.shape == (len(ids),)
        assert c.sampled_T.all()
        assert c.text == policy.decode(ids)
        ends |= {ids[-1]} if finished else set()
    assert len(ends) > 2
    assert any(c.status is Status.CUT for c in completions)


def test_the_text_has_no_end_of_sequence_token(train_config):
    policy = make.policy(train_config())
    completions = make.flat(generate(policy, make.prompts(policy), 8, sampling(), seed=4))
    finished = [c for c in completions if c.status is Status.FINISHED]
    assert finished
    for c in finished:
        assert c.token_ids_T[-1] == 1
        written = [tiny.CHARACTERS[i - 3] for i in c.token_ids_T.tolist() if 3 <= i < 3 + len(tiny.CHARACTERS)]
        assert c.text == "".join(written)


def test_an_end_of_sequence_token_at_the_limit_counts_as_finished(train_config):
    policy = replace(make.policy(train_config()), eos_ids=tuple(range(96)))
    completions = make.flat(generate(policy, make.prompts(policy), 2, sampling(1), seed=4))
    assert all(c.status is Status.FINISHED and len(c.token_ids_T) == 1 for c in completions)


def test_frequencies_of_sampled_tokens_match_the_distribution(train_config):
    policy = make.policy(train_config())
    prompts, count = make.prompts(policy)[:1], 5000
    completions = generate(policy, prompts, count, sampling(1), seed=8, concurrent_sequences=count)
    expected_V = make.trained_log_probs(policy, prompts, [completions[0][:1]], TEMPERATURE)[0].exp() * count
    seen_V = torch.bincount(torch.cat([c.token_ids_T for c in completions[0]]), minlength=96)
    often_V = expected_V >= 5
    expected = torch.cat([expected_V[often_V], expected_V[~often_V].sum()[None]])
    seen = torch.cat([seen_V[often_V], seen_V[~often_V].sum()[None]])
    chi_square, freedom = float(((seen - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom > 10
    assert abs(chi_square - freedom) < 3 * math.sqrt(2 * freedom)
