"""Where slots are filled again, and what is sampled sub-batch by sub-batch."""

from dataclasses import replace

import make
import pytest
import tiny
import tiny_models
from engines import generate, opened, sampling
from refills import check_equal, refilled

from dppo_cli.errors import ModelError
from dppo_cli.rollout import local
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.refill import ON_CUDA, Refilling, refuses


def test_cuda_is_sampled_from_with_it(policy, monkeypatch):
    monkeypatch.setattr(local, "CUDA", "cpu")
    prompts = make.prompts(policy)
    with LocalRollout("merged", None, 6, 64).load(policy, make.fail) as engine:
        engine.sync(0)
        assert engine.refilling.pace == ON_CUDA and engine.samples_with.endswith("; steps in CUDA graphs")
        found = in_order(engine.generate(prompts, 3, sampling(20), 0, seed=3))
    monkeypatch.undo()
    check_equal(found, generate(policy, prompts, 3, sampling(20)))


def test_a_cpu_is_not(policy):
    with opened(policy) as engine:
        assert engine.refilling is None and "graphs" not in engine.samples_with


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "cohere2"])
def test_other_models_are_sampled_from_sub_batch_by_sub_batch(train_config, monkeypatch, architecture):
    of = make.policy(train_config(model=architecture))
    assert refuses(of.model) == "there are no static steps for this model"
    monkeypatch.setattr(Refilling, "sample", make.fail)
    prompts = make.prompts(of)
    with refilled(of) as engine:
        assert engine.samples_with.endswith("; each kernel by itself (there are no static steps for this model)")
        found = in_order(engine.generate(prompts, 2, sampling(6), 0, seed=3))
    check_equal(found, generate(of, prompts, 2, sampling(6)))


def test_frequencies_that_follow_the_longest_sequence_are_refused(train_config, tmp_path, monkeypatch):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    monkeypatch.setitem(tiny.CONFIGS, "llama3", type(tiny.CONFIGS["llama3"])(**tiny.GROUPED, rope_parameters=rope))
    config = train_config()
    folder = tiny.save(tmp_path / "dynamic")
    of = make.policy(replace(config, model=replace(config.model, path=str(folder))))
    assert refuses(of.model) == "its rotary frequencies depend on the longest sequence"


@pytest.mark.parametrize("how", [refilled, opened])
def test_two_sets_of_frequencies_limit_the_length(train_config, tmp_path, how):
    """Tokens beyond it would change those before, in training but not in a cache."""
    config = train_config()
    folder = tiny_models.save(tmp_path / "phi3", "phi3")
    of = make.policy(replace(config, model=replace(config.model, path=str(folder))))
    prompts = make.prompts(of)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    with how(of) as engine:
        limit = tiny_models.LONGROPE_LIMIT - longest
        assert len(in_order(engine.generate(prompts, 1, sampling(limit), 0, seed=3))) == len(prompts)
        with pytest.raises(ModelError, match=f"beyond {tiny_models.LONGROPE_LIMIT} .longrope., and prompts of up to"):
            in_order(engine.generate(prompts, 1, sampling(limit + 1), 0, seed=3))
