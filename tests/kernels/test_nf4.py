"""Products with weights in NF4, against dequantised weights in float64."""

import copy

import interpreted
import pytest
import torch
from compiled import taken
from four_bit_layers import dequantised, layer, random
from torch import Tensor

nf4 = interpreted.kernels("nf4")
nf4_product = interpreted.kernels("nf4_product")
Nf4Product, Tiling = nf4_product.Nf4Product, nf4.Tiling
HALVES = (torch.bfloat16, torch.float16)


def expected(layers: list, b_Or: Tensor, scaling: list[float], x: Tensor, low: Tensor) -> list[Tensor]:
    """Rounded after W x + bias and after the sum."""
    found, rank = [], b_Or.shape[1]
    for i, (of, b) in enumerate(zip(layers, b_Or.split([of.out_features for of in layers]), strict=True)):
        base = x.double() @ dequantised(of).double().t()
        if of.bias is not None:
            base += of.bias.double()
        beside = low[..., i * rank : (i + 1) * rank].double() @ b.double().t()
        found.append((base.to(x.dtype).double() + scaling[i] * beside).to(x.dtype))
    return found


def assert_rounded_alike(found: list[Tensor], right: list[Tensor]) -> None:
    """Sums in another order may be rounded to the neighbour, and few are."""
    for a, b in zip(found, right, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=float(b.abs().max()) * 2**-9)
        assert float((a != b).float().mean()) < 0.05


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 128), (128, 192), (8, 64)])
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_decoded_bit_for_bit(dtype, outputs, inputs, wide):
    """A product with an identity matrix is the weight."""
    of = layer(outputs, inputs, dtype)
    product = Nf4Product([of], torch.zeros(outputs, 8, dtype=dtype), [1.0])
    product.wide = wide
    (found,) = product(torch.eye(inputs, dtype=dtype), torch.zeros(inputs, 8, dtype=dtype))
    assert torch.equal(found.t(), dequantised(of))


def test_all_codes_and_scales_of_both_kinds():
    for double in (False, True):
        of = layer(64, 64, double=double)
        assert of.weight.quant_state.nested is double
        assert len({int(c) for byte in of.weight.flatten() for c in (byte >> 4, byte & 15)}) == 16
        product = Nf4Product([of], torch.zeros(64, 1, dtype=torch.bfloat16), [1.0])
        (found,) = product(torch.eye(64, dtype=torch.bfloat16), torch.zeros(64, 1, dtype=torch.bfloat16))
        assert torch.equal(found.t(), dequantised(of))


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("rank", [1, 8, 16, 32, 80])
def test_products_with_an_adapter(rank, rows):
    of = layer(192, 128, bias=True)
    x, low, b_Or = (random(*shape).bfloat16() for shape in ((rows, 1, 128), (rows, rank), (192, rank)))
    found = Nf4Product([of], b_Or, [0.5])(x, low)
    assert_rounded_alike(found, expected([of], b_Or, [0.5], x, low.view(rows, 1, rank)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", [(192, 64, 64), (72, 200)])
def test_siblings_are_one_product(sizes, dtype):
    layers = [layer(size, 256, dtype, bias=i == 1, seed=i) for i, size in enumerate(sizes)]
    x, low, b_Or = (random(*shape).to(dtype) for shape in ((5, 1, 256), (5, 1, 8 * len(sizes)), (sum(sizes), 8)))
    scaling = [0.5, 2.0, 1.0][: len(sizes)]
    found = Nf4Product(layers, b_Or, scaling)(x, low)
    assert [out.shape for out in found] == [(5, 1, size) for size in sizes]
    assert_rounded_alike(found, expected(layers, b_Or, scaling, x, low))


def test_parts_of_the_inputs_are_added_in_order_and_every_launch_leaves_its_counts_at_zero():
    of = layer(192, 512)
    x, low, b_Or = (random(*shape).bfloat16() for shape in ((19, 512), (19, 8), (192, 8)))
    product = Nf4Product([of], b_Or, [1.0])
    for splits in (1, 2, 4):
        found = [product(x, low, Tiling(splits=splits)) for _ in range(2)]
        assert torch.equal(found[0][0], found[1][0]) and not product.count.any()
        assert_rounded_alike(found[0], expected([of], b_Or, [1.0], x, low))


@pytest.mark.parametrize("tiling", [Tiling(rows=32), Tiling(outputs=64), Tiling(rows=16, warps=8)])
def test_every_tiling_gives_the_same(tiling):
    of = layer(192, 128)
    x, low, b_Or = (random(*shape).bfloat16() for shape in ((37, 128), (37, 8), (192, 8)))
    assert_rounded_alike(Nf4Product([of], b_Or, [1.0])(x, low, tiling), expected([of], b_Or, [1.0], x, low))


def test_rows_in_pieces():
    """Inputs and low that are parts of longer rows."""
    of = layer(64, 64)
    x, low, b_Or = (random(*shape).bfloat16() for shape in ((4, 96), (4, 20), (64, 8)))
    found = Nf4Product([of], b_Or, [1.0])(x[:, 16:80], low[:, 4:12])
    assert_rounded_alike(found, expected([of], b_Or, [1.0], x[:, 16:80], low[:, 4:12]))


def test_codes_are_views_that_bitsandbytes_goes_on_using():
    layers = [layer(size, 128, seed=size) for size in (192, 64)]
    before = [(dequantised(of), of(random(3, 128).bfloat16())) for of in layers]
    product = Nf4Product(layers, torch.zeros(256, 8, dtype=torch.bfloat16), [1.0, 1.0])
    assert {of.weight.untyped_storage().data_ptr() for of in layers} == {product.codes.untyped_storage().data_ptr()}
    assert product.absmax.nbytes == 256 * 128 // 16
    for of, (weight, out) in zip([*layers, *copy.deepcopy(layers)], 2 * before, strict=True):
        assert type(of.weight).__name__ == "Params4bit" and of.weight.quant_state is not None
        assert torch.equal(dequantised(of), weight) and torch.equal(of(random(3, 128).bfloat16()), out)
    again = Nf4Product(layers, torch.zeros(256, 8, dtype=torch.bfloat16), [1.0, 1.0])
    assert again.codes.data_ptr() == product.codes.data_ptr()


@pytest.mark.parametrize("dtype", HALVES)
def test_it_finds_itself_right(dtype):
    assert nf4_product.difference(torch.device("cpu"), dtype) < 2**-8


def test_it_looks_at_tiles_of_both_kinds_of_instructions(monkeypatch):
    seen, product = [], Nf4Product.__call__

    def noted(self, x, low, tiling=None):
        seen.append((tiling.rows, tiling.splits))
        return product(self, x, low, tiling)

    monkeypatch.setattr(Nf4Product, "__call__", noted)
    nf4_product.difference(torch.device("cpu"), torch.bfloat16)
    assert seen == [(8, 1), (8, 2), (16, 1), (16, 2)]


def test_parts_are_chosen_to_fill_a_gpu():
    def programs(sizes, inputs: int, rows: int, wide: bool = False) -> int:
        how = nf4.choose(sizes, inputs, rows, 132, wide)
        steps = inputs // 128
        assert steps % how.splits == 0
        return sum(-(-size // how.outputs) for size in sizes) * how.splits * -(-rows // how.rows)

    for sizes, inputs in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)):
        for rows, least in ((1, 224), (16, 384), (64, 192), (128, 96), (256, 96)):
            assert programs(sizes, inputs, rows) >= least


def test_compiled_for_gpus():
    """Nothing spills, and as many programs fit on a multiprocessor as `choose` counts on."""
    found = taken("specimens_nf4")
    assert len(found) == 8
    for name, of in found.items():
        rows, wide = int(name.split()[0]), name.endswith("wide")
        taken_here = of["80" if wide else "90"]
        most = 64 if wide else 128
        at_once, threads = min(3, most // min(rows, most)), 256 if rows >= most else 128
        assert taken_here["spilled"] == 0, (name, of)
        assert at_once * threads * taken_here["registers"] <= 65536, (name, of)
        assert at_once * (taken_here["shared"] + 1024) <= (100 if wide else 228) * 1024, (name, of)
