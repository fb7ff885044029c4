"""The checks of tests/gpu/test_gpu_decode.py on a CPU: that they find what is right, and what is not."""

import decode_cases
import make
import pytest
import tiny_models
import torch

from dppo_cli.kernels import beside
from dppo_cli.rollout.refill import room_for
from dppo_cli.rollout.sampling import Wanted
from dppo_cli.rollout.static import StaticSequences


@pytest.mark.parametrize("num_logprobs", [0, 4])
def test_graphs_and_calls(train_config, num_logprobs: int) -> None:
    decode_cases.graphs_and_calls(decode_cases.policy(train_config(), "cpu", "float32"), num_logprobs)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_the_adapter(train_config, monkeypatch: pytest.MonkeyPatch, adapter: str) -> None:
    decode_cases.the_adapter_is_read_anew(decode_cases.policy(train_config(f"adapter={adapter}"), "cpu", "float32"))


def test_the_adapter_behind_the_weights(train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one product with the weights and A, which the policy goes on with."""
    monkeypatch.setattr(beside, "_may_move", lambda weight: not weight.requires_grad)
    of = decode_cases.policy(train_config(), "cpu", "float32")
    before = {name: weight.clone() for name, weight in of.model.named_parameters() if not weight.requires_grad}
    decode_cases.the_adapter_is_read_anew(of)
    decode_cases.evaluations_between_steps(of)
    assert decode_cases.slots_and_sub_batches(of) < 1e-5
    weights = {name: weight for name, weight in of.model.named_parameters() if not weight.requires_grad}
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    # Query, key and value; gate and up; two alone: four storages of a layer.
    joined = {weight.untyped_storage().data_ptr() for name, weight in weights.items() if "_proj" in name}
    assert len(joined) == 4 * len(of.model.model.layers)


def test_evaluations(train_config) -> None:
    decode_cases.evaluations_between_steps(decode_cases.policy(train_config(), "cpu", "float32"))


def test_places_change_hands(train_config) -> None:
    of = decode_cases.policy(train_config(), "cpu", "float32")
    how = decode_cases.Sampling(0.7, 1.0, 0, 0.0, 40, [])
    wanted = Wanted(make.prompts(of, decode_cases.TEXTS), 4, how, 0, ())
    room = room_for(wanted, decode_cases.SLOTS, decode_cases.SMALL)
    assert room.prompts == decode_cases.SLOTS < len(wanted.prompts)


@pytest.mark.parametrize("family", ["phi3", "smollm3", "olmo2", "gemma3", "mistral_window"])
def test_more_families(train_config, tmp_path, family: str) -> None:
    folder = tiny_models.save(tmp_path / family, family)
    of = decode_cases.policy(train_config(f"model.path={folder}"), "cpu", "float32")
    decode_cases.graphs_and_calls(of, 4)
    assert decode_cases.slots_and_sub_batches(of) < 1e-4


def test_slots_and_sub_batches(train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    of = decode_cases.policy(train_config(), "cpu", "float32")
    assert decode_cases.slots_and_sub_batches(of) < 1e-5
    step = StaticSequences.step

    def off(self: StaticSequences, *args: int) -> None:
        step(self, *args)
        self.hidden_SH.add_(0.01 * torch.ones_like(self.hidden_SH))

    monkeypatch.setattr(StaticSequences, "step", off)
    with pytest.raises(AssertionError, match=r"\d+ of \d+ tokens"):
        decode_cases.slots_and_sub_batches(of)
