"""The in-process engine: what it reports is what training computes, and what it samples is what it reports."""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import make
import pytest
import tiny
import torch
from transformers import PreTrainedModel, masking_utils

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.errors import ConfigError
from dppo_cli.policy.head import token_log_probs
from dppo_cli.policy.policy import Policy
from dppo_cli.policy.sharing import SharedPrompts
from dppo_cli.rollout import local
from dppo_cli.rollout.decoder import Decoder
from dppo_cli.rollout.local import LocalEngine, LocalRollout, Record
from dppo_cli.sections import Sampling
from dppo_cli.types import Batch, Completion, PolicyReport, Prompt

ROUNDING = dict(rtol=1e-5, atol=1e-5)
TEMPERATURE = 0.7
NO_EOS = (-1,)
architectures = pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
merging = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


def sampling(
    max_new_tokens: int = 20, temperature: float = TEMPERATURE, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Sampling:
    return Sampling(temperature, top_p, top_k, min_p, max_new_tokens)


def engine(of: Policy, merge: bool = True, concurrent_sequences: int = 512) -> LocalEngine:
    return LocalRollout(merge, None, concurrent_sequences, max_logprobs=1024).load(of)


def reported(completions: Sequence[Completion]) -> PolicyReport:
    return PolicyReport.cat([c.mu for c in completions])


def trained(of: Policy, completions: Sequence[Completion]) -> torch.Tensor:
    """Log-prob of each token as the learner computes it."""
    batch = Batch.pack(make.samples(completions, [1.0] * len(completions)), of.pad_id, of.device)
    hidden_NH = SharedPrompts(of, batch.prompts.token_ids, budget=64).predicting_states(batch)
    return token_log_probs(of.head.at(TEMPERATURE), hidden_NH, batch.token_N, chunk_size=64)[0].detach()


@architectures
@merging
@pytest.mark.parametrize("texts", [make.MIXED, ("3+4=", "a - ")], ids=["padded", "equal lengths"])
def test_log_probs_are_those_of_the_training_forward(train_config, architecture, merge, texts):
    policy = make.policy(train_config(model=architecture))
    sampler = engine(policy, merge)
    fresh = sampler.generate(make.prompts(policy, texts), 3, sampling(), 0, seed=3)
    torch.testing.assert_close(reported(fresh).logp_N, trained(policy, fresh), **ROUNDING)

    make.move_adapter(policy, 0.1)
    sampler.sync(1)
    moved = sampler.generate(make.prompts(policy, texts), 3, sampling(), 0, seed=3)
    torch.testing.assert_close(reported(moved).logp_N, trained(policy, moved), **ROUNDING)
    with policy.without_adapter():
        assert (trained(policy, moved) - reported(moved).logp_N).abs().max() > 0.05, "the adapter made no difference"


@merging
def test_it_samples_from_the_policy_as_it_is(train_config, merge):
    """And says which version that was: the one of the last sync."""
    policy = make.policy(train_config())
    sampler = engine(policy, merge)
    prompts = make.prompts(policy)
    before = sampler.generate(prompts, 2, sampling(), 0, seed=1)
    make.move_adapter(policy, 0.3)
    sampler.sync(7)
    after = sampler.generate(prompts, 2, sampling(), 0, seed=1)
    assert make.tokens(after) != make.tokens(before)
    assert {c.version for c in before} == {0}
    assert {c.version for c in after} == {7}


@architectures
def test_top_k_is_that_of_the_training_forward(train_config, architecture):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    completions = engine(policy).generate(make.prompts(policy), 2, sampling(), 5, seed=3)
    mu = reported(completions)
    log_pi_NV = make.trained_log_probs(policy, completions, TEMPERATURE)
    best = log_pi_NV.topk(5, dim=-1)
    assert mu.topk_ids_NK.shape == (len(mu.logp_N), 5)
    torch.testing.assert_close(mu.topk_logp_NK, best.values, **ROUNDING)
    torch.testing.assert_close(log_pi_NV.gather(-1, mu.topk_ids_NK), mu.topk_logp_NK, **ROUNDING)
    clear_N = (best.values[:, :-1] - best.values[:, 1:]).amin(-1) > 1e-3  # no ties that rounding could turn round
    assert clear_N.float().mean() > 0.9
    assert torch.equal(mu.topk_ids_NK[clear_N], best.indices[clear_N])


def test_a_list_longer_than_the_vocabulary_is_the_whole_vocabulary(train_config):
    policy = make.policy(train_config())
    completions = engine(policy).generate(make.prompts(policy), 2, sampling(), 500, seed=3)
    mu = reported(completions)
    assert torch.equal(mu.topk_ids_NK.sort(-1).values, torch.arange(96).expand(len(mu.logp_N), -1))
    rebuilt_NV = torch.empty(len(mu.logp_N), 96).scatter(-1, mu.topk_ids_NK, mu.topk_logp_NK)
    expected_NV = make.trained_log_probs(policy, completions, TEMPERATURE)
    torch.testing.assert_close(rebuilt_NV, expected_NV, **ROUNDING)


@architectures
@merging
def test_whole_vocabulary_reports_rebuild_the_distribution(train_config, architecture, merge):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    completions = engine(policy, merge).generate(make.prompts(policy), 2, sampling(), WHOLE_VOCABULARY, seed=3)
    mu = reported(completions)
    expected_NV = make.trained_log_probs(policy, completions, TEMPERATURE)
    torch.testing.assert_close(mu.full_log_probs(), expected_NV, **ROUNDING)
    token_N = torch.cat([c.token_ids_T for c in completions])
    torch.testing.assert_close(mu.full_log_probs().gather(-1, token_N[:, None])[:, 0], mu.logp_N, **ROUNDING)


@torch.no_grad()
def naive_generate(
    policy: Policy, prompts: list[Prompt], group: int, length: int, generator: torch.Generator
) -> list[list[int]]:
    """One wave without cache, padding or batch: the whole sequence again for every token."""
    size = len(prompts) * group
    responses: list[list[int]] = [[] for _ in range(size)]
    for uniform_B in torch.rand(length, size, generator=generator):
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
    found = engine(policy).generate(prompts, 2, sampling(12), 0, seed=11)
    expected = naive_generate(policy, prompts, 2, 12, torch.Generator().manual_seed(11))
    assert make.tokens(found) == expected
    assert len({len(response) for response in expected}) > 1, "sequences should end at different times here"


def test_waves_are_sampled_one_after_the_other_from_one_generator(train_config):
    policy = make.policy(train_config())
    prompts = make.prompts(policy)[:3]
    found = engine(policy, concurrent_sequences=5).generate(prompts, 2, sampling(6), 0, seed=11)
    generator = torch.Generator().manual_seed(11)
    expected = naive_generate(policy, prompts[:2], 2, 6, generator)
    expected += naive_generate(policy, prompts[2:], 2, 6, generator)
    assert make.tokens(found) == expected
    assert [c.prompt.index for c in found] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("concurrent_sequences", [1, 4, 7])
def test_reports_are_right_in_every_wave(train_config, concurrent_sequences):
    """Also where a wave is smaller than one prompt's samples: a group is never split."""
    policy = make.policy(train_config(model="gemma2"), adapter_scale=0.1)
    completions = engine(policy, concurrent_sequences=concurrent_sequences).generate(
        make.prompts(policy), 3, sampling(), 0, seed=5
    )
    assert [c.prompt.index for c in completions] == [i for i in range(4) for _ in range(3)]
    torch.testing.assert_close(reported(completions).logp_N, trained(policy, completions), **ROUNDING)


@architectures
def test_a_token_does_not_depend_on_who_else_has_finished(train_config, architecture):
    policy = make.policy(train_config(model=architecture))
    stopping = replace(policy, eos_ids=(1, *range(5, 12)))
    running = engine(replace(policy, eos_ids=NO_EOS)).generate(make.prompts(policy), 4, sampling(), 0, seed=2)
    stopped = engine(stopping).generate(make.prompts(policy), 4, sampling(), 0, seed=2)
    lengths = [len(c.token_ids_T) for c in stopped]
    assert len(set(lengths)) > 4, "sequences should end at different times here"
    assert all(len(c.token_ids_T) == 20 and not c.finished for c in running)
    for short, long, length in zip(stopped, running, lengths, strict=True):
        assert short.token_ids_T.tolist() == long.token_ids_T[:length].tolist()
        torch.testing.assert_close(short.mu.logp_N, long.mu.logp_N[:length], **ROUNDING)


@architectures
@pytest.mark.parametrize("texts", [make.MIXED, ("3+4=", "a - ", "b - ")], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("num_logprobs", [0, 5, WHOLE_VOCABULARY])
def test_the_host_waits_for_the_device_only_to_see_who_has_finished(
    train_config, monkeypatch, architecture, texts, num_logprobs
):
    """Tensors on the meta device have no values, so whatever would wait for one fails.

    Once a wave transformers asks whether prompts are padded; the test answers for the device.
    """
    prefill = Decoder.prefill

    def answered(decoder: Decoder) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(masking_utils, "fast_all", lambda _: False)
            patch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None)
            return prefill(decoder)

    monkeypatch.setattr(Decoder, "prefill", answered)
    policy = make.policy(train_config(model=architecture))
    prompts = make.prompts(policy, texts[:3])
    policy = replace(policy, model=copy.deepcopy(policy.model).to("meta"), device=torch.device("meta"))
    monkeypatch.setattr(Policy, "autocast", lambda _: nullcontext())  # which knows no such device
    monkeypatch.setattr(Record, "reports", lambda record: steps.append(record.steps) or [])
    steps: list[int] = []
    sampler = LocalEngine(policy, None, concurrent_sequences=512)
    with pytest.raises(NotImplementedError, match="meta"):
        sampler.generate(prompts, 2, sampling(), num_logprobs, seed=0)
    ended = [[], [0, 3], [], [1], [0, 1, 2]]
    answers = (torch.tensor([row not in rows for row in range(6)]) for rows in ended)
    size = iter([6, 6, 4, 4, 3])
    monkeypatch.setattr(local, "_still_writing", lambda *_: next(answers)[: next(size)])
    if (architecture, texts is make.MIXED) in {("cohere2", True), ("gpt2", False)}:  # transformers' own questions
        with pytest.raises(RuntimeError, match="meta"):
            sampler.generate(prompts, 2, sampling(top_p=0.9, top_k=5, min_p=0.1), num_logprobs, seed=0)
    else:
        sampler.generate(prompts, 2, sampling(top_p=0.9, top_k=5, min_p=0.1), num_logprobs, seed=0)
        assert steps == [len(ended)]


def test_the_record_keeps_each_sequence_in_memory_that_is_there_before_the_first_step(train_config):
    """Sequences leave, the others change places, and no step needs new memory that stays."""
    record = Record(3, 4, make.policy(train_config()).head, num_logprobs=2)
    places = []
    logits_AV = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    for token, active in enumerate(([0, 1, 2], [2, 1], [2])):
        rows = torch.tensor(active)
        logits = logits_AV[rows]
        record.add(rows, torch.full_like(rows, token), logits, torch.zeros(len(rows), 1), logits)
        places.append([column.data_ptr() for column in record.columns])
    (token_0, mu_0), (token_1, mu_1), (token_2, mu_2) = record.reports()
    assert (token_0.tolist(), token_1.tolist(), token_2.tolist()) == ([0], [0, 1], [0, 1, 2])
    assert (mu_0.logp_N.tolist(), mu_1.logp_N.tolist(), mu_2.logp_N.tolist()) == ([0], [2, 1], [1, 2, 0])
    assert mu_0.topk_ids_NK.tolist() == [[2, 1]] and mu_2.topk_ids_NK.tolist() == [[1, 0]] * 3
    assert mu_1.topk_logp_NK.tolist() == [[2, 1], [2, 1]]
    assert places[0] == places[1] == places[2]


def test_equal_seeds_give_equal_tokens_and_other_seeds_others(train_config):
    policy = make.policy(train_config())
    sampler, prompts = engine(policy), make.prompts(policy)
    first = sampler.generate(prompts, 3, sampling(), 0, seed=1)
    torch.manual_seed(99)  # the global generator is not asked
    again = sampler.generate(prompts, 3, sampling(), 0, seed=1)
    other = sampler.generate(prompts, 3, sampling(), 0, seed=2)
    assert make.tokens(again) == make.tokens(first)
    assert make.tokens(other) != make.tokens(first)
    assert make.tokens(first)[0] != make.tokens(first)[1], "samples of one prompt differ"


def test_responses_stop_at_any_end_of_sequence_token_and_keep_it(train_config):
    policy = replace(make.policy(train_config()), eos_ids=(1, 17, *range(20, 30)))
    completions = engine(policy).generate(make.prompts(policy), 8, sampling(10), 0, seed=4)
    ends = set()
    for c in completions:
        ids = c.token_ids_T.tolist()
        assert not set(ids[:-1]) & set(policy.eos_ids)
        assert c.finished == (ids[-1] in policy.eos_ids)
        assert c.finished or len(ids) == 10
        assert len(ids) <= 10
        assert c.mu.logp_N.shape == (len(ids),)
        assert c.sampled_T.all()
        assert c.text == policy.decode(ids)
        ends |= {ids[-1]} if c.finished else set()
    assert len(ends) > 2
    assert any(not c.finished for c in completions)


def test_the_text_has_no_end_of_sequence_token(train_config):
    policy = make.policy(train_config())
    completions = engine(policy).generate(make.prompts(policy), 8, sampling(), 0, seed=4)
    finished = [c for c in completions if c.finished]
    assert finished
    for c in finished:
        assert c.token_ids_T[-1] == 1
        written = [tiny.CHARACTERS[i - 3] for i in c.token_ids_T.tolist() if 3 <= i < 3 + len(tiny.CHARACTERS)]
        assert c.text == "".join(written)


def test_an_end_of_sequence_token_at_the_limit_counts_as_finished(train_config):
    policy = replace(make.policy(train_config()), eos_ids=tuple(range(96)))
    completions = engine(policy).generate(make.prompts(policy), 2, sampling(1), 0, seed=4)
    assert all(c.finished and len(c.token_ids_T) == 1 for c in completions)


@architectures
def test_a_sampling_copy_in_bfloat16_differs_a_little(train_config, architecture):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    sampler = LocalRollout(True, "bfloat16", 512, 1024).load(policy)
    completions = sampler.generate(make.prompts(policy), 4, sampling(), 0, seed=3)
    mismatch_N = (reported(completions).logp_N.exp() - trained(policy, completions).exp()).abs()
    assert 1e-5 < mismatch_N.mean() < 0.05
    assert reported(completions).logp_N.dtype == torch.float32
    assert {p.dtype for p in sampler.copy.model.parameters()} == {torch.bfloat16}
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), f"the sampling copy changed the policy's {name}"


def test_a_lower_precision_of_training_is_sampled_with_the_same_rounding(train_config):
    """The policy's own model samples under autocast as it trains; else the adapter would run in float32."""
    policy = make.policy(train_config("hardware.dtype=bfloat16"), adapter_scale=0.1)
    prompts = make.prompts(policy, ("12+34=", "abcdef"))
    completions = engine(policy, merge=False).generate(prompts, 4, sampling(1), 0, seed=3)
    torch.testing.assert_close(reported(completions).logp_N, trained(policy, completions), **ROUNDING)
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    assert policy.head.weight_VH.dtype == torch.bfloat16


def test_temperature_zero_takes_the_likeliest_token_and_reports_temperature_one(train_config):
    policy = make.policy(train_config(), adapter_scale=0.1)
    completions = engine(policy).generate(make.prompts(policy), 2, sampling(temperature=0), 0, seed=3)
    log_pi_NV = make.trained_log_probs(policy, completions, temperature=1.0)
    assert torch.equal(torch.cat([c.token_ids_T for c in completions]), log_pi_NV.argmax(-1))
    torch.testing.assert_close(reported(completions).logp_N, log_pi_NV.amax(-1), **ROUNDING)
    assert make.tokens(completions)[::2] == make.tokens(completions)[1::2]


def test_truncation_keeps_to_the_list_and_leaves_the_report_untruncated(train_config):
    policy = make.policy(train_config())
    completions = engine(policy).generate(make.prompts(policy), 8, sampling(top_k=3), 0, seed=3)
    log_pi_NV = make.trained_log_probs(policy, completions, TEMPERATURE)
    token_N = torch.cat([c.token_ids_T for c in completions])
    assert (log_pi_NV.topk(3, dim=-1).indices == token_N[:, None]).any(-1).all()
    logp_N = log_pi_NV.gather(-1, token_N[:, None])[:, 0]
    torch.testing.assert_close(reported(completions).logp_N, logp_N, **ROUNDING)


def test_frequencies_of_sampled_tokens_match_the_distribution(train_config):
    policy = make.policy(train_config())
    count = 5000
    completions = engine(policy, concurrent_sequences=count).generate(
        make.prompts(policy)[:1], count, sampling(1), 0, seed=8
    )
    expected_V = make.trained_log_probs(policy, completions[:1], TEMPERATURE)[0].exp() * count
    seen_V = torch.bincount(torch.cat([c.token_ids_T for c in completions]), minlength=96)
    often_V = expected_V >= 5
    expected = torch.cat([expected_V[often_V], expected_V[~often_V].sum()[None]])
    seen = torch.cat([seen_V[often_V], seen_V[~often_V].sum()[None]])
    chi_square, freedom = float(((seen - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom > 10
    assert abs(chi_square - freedom) < 3 * math.sqrt(2 * freedom)


def test_adapter_dropout_is_off_while_sampling_and_on_again_after(train_config):
    policy = make.policy(train_config("adapter.dropout=0.5"), adapter_scale=0.3)
    assert policy.model.training
    completions = engine(policy, merge=False).generate(make.prompts(policy), 2, sampling(), 0, seed=3)
    assert policy.model.training
    policy.model.eval()
    torch.testing.assert_close(reported(completions).logp_N, trained(policy, completions), **ROUNDING)


def test_a_model_without_adapter_samples_as_it_is(train_config, tiny_models):
    config = train_config()
    plain = make.plain_policy(tiny_models["llama3"], config)
    completions = engine(plain).generate(make.prompts(plain), 2, sampling(), 0, seed=3)
    torch.testing.assert_close(reported(completions).logp_N, trained(plain, completions), **ROUNDING)
    fresh = make.policy(config)
    assert make.tokens(engine(fresh).generate(make.prompts(fresh), 2, sampling(), 0, seed=3)) == make.tokens(
        completions
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float12"}, "rollout.dtype=float12"),
        ({"dtype": "bfloat16", "merge": False}, "rollout.merge=true"),
        ({"concurrent_sequences": 0}, "rollout.concurrent_sequences=0"),
        ({"max_logprobs": 0}, "rollout.max_logprobs=0"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        LocalRollout(**{"merge": True, "dtype": None, "concurrent_sequences": 8, "max_logprobs": 8, **fields})


def test_combinations_that_cannot_work_are_refused(train_config):
    source = LocalRollout(True, None, 8, max_logprobs=20)
    adapter = train_config().adapter
    source.check(20, adapter)
    source.check(WHOLE_VOCABULARY, adapter)
    with pytest.raises(ConfigError, match=r"approx\.k=21 is more than rollout\.max_logprobs=20"):
        source.check(21, adapter)
    with pytest.raises(ConfigError, match=r"nf4; use rollout\.merge=false"):
        source.check(0, replace(adapter, quantization="nf4"))
    replace(source, merge=False).check(0, replace(adapter, quantization="nf4"))
