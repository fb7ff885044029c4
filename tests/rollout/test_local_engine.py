"""The in-process engine: its life, what it keeps, when it waits for the device, and which options it takes."""

import copy
import gc
import itertools
import weakref
from contextlib import nullcontext
from dataclasses import replace

import make
import pytest
import tiny
import torch
from engines import opened, sampling
from transformers import PreTrainedModel, masking_utils

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.errors import ConfigError, NumericalError
from dppo_cli.policy import loading
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import local
from dppo_cli.rollout.decoder import Decoder
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalEngine, LocalRollout
from dppo_cli.rollout.record import Record
from dppo_cli.rollout.weights import decide

merging = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


# Its life


@merging
def test_it_samples_from_the_policy_as_it_is(train_config, merge):
    """And says which version that was: the one of the last sync."""
    policy = make.policy(train_config())
    prompts = make.prompts(policy)
    with opened(policy, merge=merge) as engine:
        before = in_order(engine.generate(prompts, 2, sampling(), 0, seed=1))
        make.move_adapter(policy, 0.3)
        engine.sync(7)
        after = in_order(engine.generate(prompts, 2, sampling(), 0, seed=1))
    assert make.tokens(after) != make.tokens(before)
    assert {c.versions for c in make.flat(before)} == {(0,)}
    assert {c.versions for c in make.flat(after)} == {(7,)}


@merging
def test_it_is_synced_before_its_first_use(train_config, merge):
    """Each time that it is opened."""
    policy = make.policy(train_config())
    engine, prompts = (
        LocalRollout("merged" if merge else "adapter", None, 8, 8).load(policy, make.fail),
        make.prompts(policy),
    )
    for _ in range(2):
        with engine:
            with pytest.raises(AssertionError, match="sync the engine before its first use"):
                engine.generate(prompts, 2, sampling(2), 0, seed=1)
            engine.sync(3)
            completions = in_order(engine.generate(prompts, 2, sampling(2), 0, seed=1))
            assert {c.versions for c in make.flat(completions)} == {(3,)}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt], ids=["at the end", "after an error"])
def test_the_copy_exists_while_the_engine_is_open(train_config, error):
    policy = make.policy(train_config())
    engine = LocalRollout("merged", None, 8, 8).load(policy, make.fail)
    assert engine.copy is None
    with nullcontext() if error is None else pytest.raises(error), engine:
        engine.sync(0)
        in_order(engine.generate(make.prompts(policy), 2, sampling(2), 0, seed=1))
        copied = weakref.ref(engine.copy.model)
        if error is not None:
            raise error
    assert engine.copy is None
    gc.collect()
    assert copied() is None, "something still holds the copy"


# What it waits for, and what it keeps


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize("texts", [make.MIXED, ("3+4=", "a - ", "b - ")], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("num_logprobs", [0, 5, WHOLE_VOCABULARY])
def test_the_host_waits_for_the_device_only_to_see_who_has_finished(
    train_config, monkeypatch, architecture, texts, num_logprobs
):
    """Tensors on the meta device have no values, so whatever would wait for one fails.

    Once a sub-batch transformers asks whether prompts are padded; the test answers for the device.
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
    nothing = itertools.repeat((None, None))
    monkeypatch.setattr(Record, "reports", lambda record, of: steps.append((record.steps, of)) or nothing)
    monkeypatch.setattr(local, "completion", lambda *_: None)
    steps: list[tuple[int, list[int]]] = []
    engine = LocalEngine(policy, decide("adapter", None, policy), concurrent_sequences=512)
    engine.sync(0)
    with pytest.raises(NotImplementedError, match="meta"):
        in_order(engine.generate(prompts, 2, sampling(), num_logprobs, seed=0))
    ended = [[], [0, 3], [], [1], [0, 1, 2]]
    answers = (torch.tensor([row not in rows for row in range(6)]) for rows in ended)
    size = iter([6, 6, 4, 4, 3])
    monkeypatch.setattr(local, "_still_writing", lambda *_: next(answers)[: next(size)])
    if (architecture, texts is make.MIXED) in {("cohere2", True), ("gpt2", False)}:  # transformers' own questions
        with pytest.raises(RuntimeError, match="meta"):
            in_order(engine.generate(prompts, 2, sampling(top_p=0.9, top_k=5, min_p=0.1), num_logprobs, seed=0))
    else:
        in_order(engine.generate(prompts, 2, sampling(top_p=0.9, top_k=5, min_p=0.1), num_logprobs, seed=0))
        # Of the first prompt one sample ended at the second look, the other at the fourth.
        assert steps == [(4, [0, 1]), (5, [2, 3, 4, 5])]


def test_the_record_keeps_each_sequence_in_memory_that_is_there_before_the_first_step(train_config):
    """Sequences leave, the others change rows, and no step needs new memory that stays."""
    record = Record(3, 4, make.policy(train_config()).head, num_logprobs=2)
    addresses = []
    logits_AV = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    for token, active in enumerate(([0, 1, 2], [2, 1], [2])):
        rows = torch.tensor(active)
        logits = logits_AV[rows]
        record.add(rows, torch.full_like(rows, token), logits, torch.zeros(len(rows), 1), logits)
        addresses.append([column.data_ptr() for column in record.columns])
    (token_0, mu_0), (token_1, mu_1), (token_2, mu_2) = record.reports([0, 1, 2])
    assert (token_0.tolist(), token_1.tolist(), token_2.tolist()) == ([0], [0, 1], [0, 1, 2])
    assert (mu_0.logp_N.tolist(), mu_1.logp_N.tolist(), mu_2.logp_N.tolist()) == ([0], [2, 1], [1, 2, 0])
    assert mu_0.topk_ids_NK.tolist() == [[2, 1]] and mu_2.topk_ids_NK.tolist() == [[1, 0]] * 3
    assert mu_1.topk_logp_NK.tolist() == [[2, 1], [2, 1]]
    assert addresses[0] == addresses[1] == addresses[2]


# Its options


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float12"}, "rollout.dtype=float12"),
        ({"weights": "merge"}, "rollout.weights=merge is an invalid value; did you mean 'merged'"),
        ({"concurrent_sequences": 0}, "rollout.concurrent_sequences=0"),
        ({"max_logprobs": 0}, "rollout.max_logprobs=0"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        LocalRollout(**{"weights": "auto", "dtype": None, "concurrent_sequences": 8, "max_logprobs": 8, **fields})


def test_combinations_that_cannot_work_are_refused(train_config):
    source = LocalRollout("auto", None, 8, max_logprobs=20)
    adapter = train_config().adapter
    source.check(20, adapter)
    source.check(WHOLE_VOCABULARY, adapter)
    with pytest.raises(ConfigError, match=r"approx\.k=21 is more than rollout\.max_logprobs=20"):
        source.check(21, adapter)
    source.check(0, replace(adapter, quantization="nf4"))
    with pytest.raises(ConfigError, match=r"rollout\.weights=dequantized needs a quantised base"):
        replace(source, weights="dequantized").check(0, adapter)


@pytest.mark.parametrize(
    ("trained", "sampled", "warns"),
    [
        ("float32", "bfloat16", True),
        ("float32", None, False),
        ("float32", "float16", False),
        # The loading of the policy has warned.
        ("bfloat16", None, False),
        ("bfloat16", "bfloat16", False),
    ],
)
def test_sampling_in_bfloat16_on_a_processor_without_it_warns(train_config, monkeypatch, trained, sampled, warns):
    monkeypatch.setattr(loading, "emulates_bfloat16", lambda *_: False)
    policy = make.policy(train_config(f"hardware.dtype={trained}"))
    warnings: list[str] = []
    monkeypatch.setattr(local, "emulates_bfloat16", lambda device, dtype: dtype == torch.bfloat16)
    LocalRollout("auto", sampled, 8, 8).load(policy, warnings.append)
    assert len(warnings) == warns
    assert all("rollout.dtype=bfloat16 on a processor without bfloat16" in text for text in warnings)
    monkeypatch.setattr(local, "emulates_bfloat16", lambda *_: False)
    LocalRollout("auto", sampled, 8, 8).load(policy, make.fail)


def test_a_broken_policy_is_told_in_words(train_config):
    """Weights of NaN give no distribution to sample from, nor log-probs to train on."""
    policy = make.policy(train_config())
    make.move_adapter(policy, float("nan"))
    with (
        opened(policy) as engine,
        pytest.raises(NumericalError, match="log-probs of a sampled response are not finite"),
    ):
        in_order(engine.generate(make.prompts(policy), 2, sampling(), 0, seed=1))
