"""LoRA beside weights that are one product: with views of it in the layers, and with the adapters added at once."""

from dataclasses import replace

import interpreted
import make
import pytest
import torch
from beside_cases import SIBLINGS, inputs, layers
from recording import addresses
from torch import nn

from dppo_cli.kernels import beside as beside_module
from dppo_cli.kernels.beside import Beside


@torch.inference_mode()
def test_weights_of_siblings_are_one_product_where_that_is_wanted(train_config, monkeypatch):
    """The modules go on as they are, with views of it; a second `Beside` finds them."""
    policy = make.policy(train_config(), adapter_scale=0.3)
    of, x = layers(policy), inputs(policy)
    base = of[1].get_base_layer()
    base.bias = nn.Parameter(torch.arange(1.0, 1 + base.out_features), requires_grad=False)
    expected = [layer(x) for layer in of]
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(beside_module, "_may_move", lambda weight: not weight.requires_grad)
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or linear(*args))
    places = []
    for _ in range(2):
        beside = Beside(torch.float32)
        products = beside(*of)
        calls.clear()
        found = products(x)
        assert len(calls) == 1, "one of A and W"
        places.append(addresses(*(whole for _, whole in beside.wholes)))
        for out, layer, plain in zip(found, of, expected, strict=True):
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)
    assert places[0] == places[1]
    beside.refresh()
    base.weight.data = base.weight.data.clone()
    with pytest.raises(AssertionError, match="replaced"):
        beside.refresh()


def test_training_goes_on_with_joined_weights(train_config, monkeypatch):
    """Made in inference mode, they can be saved for a backward pass."""
    policy = make.policy(train_config(), adapter_scale=0.3)
    of, x = layers(policy), inputs(policy).requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(torch.stack([layer(x).square().sum() for layer in of]).sum(), x)[0]

    before = gradient()
    monkeypatch.setattr(beside_module, "_may_move", lambda _: True)
    with torch.inference_mode():
        beside = Beside(torch.float32)
        beside(*of)
    assert len(beside.wholes) == 1
    torch.testing.assert_close(gradient(), before, rtol=0, atol=0)


class TestAtOnce:
    """16-bit bases as on a GPU: A behind the weights, and one kernel, in the interpreter, for the B of all layers."""

    @pytest.fixture(autouse=True)
    def on_gpu(self, monkeypatch):
        self.kernel = interpreted.kernels("adapter_up")
        self.launches = []
        add_up = self.kernel.add_up

        def counted(out, *of):
            self.launches.append(out.shape)
            return add_up(out, *of)

        monkeypatch.setattr(beside_module, "without_triton", lambda *_: None)
        monkeypatch.setattr(beside_module, "_may_move", lambda weight: not weight.requires_grad)
        monkeypatch.setattr(self.kernel, "add_up", counted)
        beside_module._refused_up(torch.device("cpu"), torch.bfloat16)
        self.launches.clear()
        yield
        beside_module._refused_up.cache_clear()

    @staticmethod
    def policy(train_config, *words: str):
        policy = make.policy(train_config(*words), adapter_scale=0.3)
        for part in policy.model.modules():
            if type(part) is nn.Linear and not part.weight.requires_grad:
                part.to(torch.bfloat16)
        return replace(policy, dtype=torch.bfloat16)

    @pytest.mark.parametrize("names", [SIBLINGS, ("o_proj",)], ids=["siblings", "one"])
    @pytest.mark.parametrize("rank", [4, 24, 32])
    @torch.inference_mode()
    def test_the_products_are_those_of_the_layers(self, train_config, names, rank):
        policy = self.policy(train_config, f"adapter.r={rank}", f"adapter.alpha={2 * rank}")
        of, x = layers(policy, names), inputs(policy, dtype=torch.bfloat16)
        bias = torch.arange(1.0, 1 + of[0].out_features).bfloat16()
        of[0].get_base_layer().bias = nn.Parameter(bias, requires_grad=False)
        with policy.autocast(), torch.autocast("cpu", torch.bfloat16):
            expected = [layer(x) for layer in of]
        beside = Beside(torch.bfloat16, make.fail)
        found = beside(*of)(x)
        room = -(-rank * len(of) // 64) * 64
        assert self.launches == [(5, 1, sum(layer.out_features for layer in of) + room)]
        assert len(found) == len(of)
        for out, right in zip(found, expected, strict=True):
            assert out.shape == right.shape and out.stride(-1) == 1
            torch.testing.assert_close(out, right, rtol=2**-6, atol=2**-6 * float(right.abs().max()))

    @torch.inference_mode()
    def test_they_are_those_of_plain_operations(self, train_config, monkeypatch):
        policy = self.policy(train_config)
        of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
        ours = Beside(torch.bfloat16, make.fail)(*of)(x)
        monkeypatch.setattr(beside_module, "without_triton", lambda *_: "")
        one_by_one = Beside(torch.bfloat16, make.fail)(*of)(x)
        monkeypatch.setattr(beside_module, "_may_move", lambda _: False)
        plain = Beside(torch.bfloat16, make.fail)(*of)(x)
        assert len(self.launches) == 1
        for others in (one_by_one, plain):
            for a, b in zip(ours, others, strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))
                assert float((a != b).float().mean()) < 0.05

    @torch.inference_mode()
    def test_the_adapter_is_taken_over_in_place(self, train_config):
        policy = self.policy(train_config)
        of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
        beside = Beside(torch.bfloat16, make.fail)
        products = beside(*of)
        ((parameters, whole),) = beside.wholes
        before, weights = addresses(whole, *beside.copies), [p.data.clone() for p in parameters]
        stale = products(x)
        for layer in of:
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.weight.mul_(1.5)
        beside.refresh()
        assert addresses(whole, *beside.copies) == before
        assert all(torch.equal(p, values) for p, values in zip(parameters, weights, strict=True))
        for out, old, new in zip(products(x), stale, Beside(torch.bfloat16, make.fail)(*of)(x), strict=True):
            assert torch.equal(out, new) and (out - old).abs().max() > 0.1

    @torch.inference_mode()
    def test_another_finds_the_weights_joined(self, train_config, monkeypatch):
        """With a lower rank, too, whose room is filled up with zeros. A higher one has them joined anew."""
        freed: list[torch.device] = []
        monkeypatch.setattr(beside_module, "empty_cache", freed.append)
        policy = self.policy(train_config, "adapter.r=30")
        of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
        Beside(torch.bfloat16, make.fail)(*of)
        storages = {layer.get_base_layer().weight.untyped_storage().data_ptr() for layer in of}
        assert len(storages) == 1
        size = of[0].get_base_layer().weight.untyped_storage().nbytes()

        def cut(rank: int) -> None:
            for layer in of:
                for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                    a.weight = nn.Parameter(a.weight[:1].repeat(rank, 1))
                    b.weight = nn.Parameter(b.weight[:, :1].repeat(1, rank) / rank)

        for rank, rows in ((30, 128), (9, 64), (50, 192)):
            cut(rank)
            beside = Beside(torch.bfloat16, make.fail)
            found = beside(*of)(x)
            ((parameters, whole),) = beside.wholes
            assert len(whole) == sum(layer.out_features for layer in of) + rows
            assert not whole[len(whole) - rows + 3 * rank :].any()
            with torch.autocast("cpu", torch.bfloat16):
                for out, layer in zip(found, of, strict=True):
                    torch.testing.assert_close(out, layer(x), rtol=2**-6, atol=2**-4)
            now = {parameter.untyped_storage().data_ptr() for parameter in parameters}
            assert (now == storages) == (rank < 50)
            if rank < 50:
                assert parameters[0].untyped_storage().nbytes() == size
        assert len(now) == 1 and freed == 2 * [torch.device("cpu")]

    @torch.inference_mode()
    def test_siblings_of_different_ranks_are_added_one_by_one(self, train_config):
        policy = self.policy(train_config, "adapter.r=4")
        of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
        for layer in of[1:]:
            for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                a.weight, b.weight = nn.Parameter(a.weight[:3]), nn.Parameter(b.weight[:, :3])
        beside = Beside(torch.bfloat16, make.fail)
        found = beside(*of)(x)
        assert not self.launches and len(beside.wholes) == 1
        with torch.autocast("cpu", torch.bfloat16):
            for out, layer in zip(found, of, strict=True):
                torch.testing.assert_close(out, layer(x), rtol=2**-6, atol=2**-5)

    @torch.inference_mode()
    def test_a_kernel_that_computes_something_else_is_not_used_which_is_said_once(self, train_config, monkeypatch):
        beside_module._refused_up.cache_clear()
        monkeypatch.setattr(self.kernel, "difference", lambda *_: 0.5)
        policy, warned = self.policy(train_config), []
        of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
        beside = Beside(torch.bfloat16, warned.append)
        for names in (SIBLINGS, ("o_proj",)):
            beside(*layers(policy, names))
        assert warned == [beside_module.NOT_AT_ONCE.format("its results are 0.5 off")]
        with torch.autocast("cpu", torch.bfloat16):
            for out, layer in zip(beside(*of)(x), of, strict=True):
                torch.testing.assert_close(out, layer(x), rtol=2**-6, atol=2**-6 * float(out.abs().max()))
        assert not self.launches

    @torch.inference_mode()
    def test_ranks_that_it_is_not_made_for_are_added_one_by_one(self, train_config, monkeypatch):
        monkeypatch.setattr(self.kernel, "MOST_RANK", 7)
        policy = self.policy(train_config, "adapter.r=8")
        of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
        found = Beside(torch.bfloat16, make.fail)(*of)(x)
        with torch.autocast("cpu", torch.bfloat16):
            for out, layer in zip(found, of, strict=True):
                torch.testing.assert_close(out, layer(x), rtol=2**-6, atol=2**-6 * float(out.abs().max()))
        assert not self.launches
