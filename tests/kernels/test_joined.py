"""Weights that become views of one tensor."""

import torch
from recording import addresses
from torch import Tensor, nn

from dppo_cli.kernels.joined import are_joined, joined


def parameters(*rows: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, 4, generator=generator), requires_grad=False) for n in rows]


def test_they_become_views_of_one_tensor():
    of = parameters(3, 1, 2)
    before = [p.data.clone() for p in of]
    whole = joined(of)
    assert torch.equal(whole, torch.cat(before)) and are_joined(of, whole)
    whole[3] = 7
    assert torch.equal(of[1].data, torch.full((1, 4), 7.0)) and torch.equal(of[0].data, before[0])


def test_joining_again_gives_the_same_memory():
    of = parameters(3, 2)
    whole = joined(of)
    assert addresses(joined(of), *of) == addresses(whole, *of) and joined(of).shape == (5, 4)


def test_another_order_or_a_gap_is_not_taken_for_it():
    for of in (lambda a, b, _: (b, a), lambda a, _, c: (a, c)):
        chosen = list(of(*_views(joined(parameters(2, 2, 2)))))
        values = torch.cat([p.data for p in chosen])
        assert torch.equal(joined(chosen), values) and are_joined(chosen, joined(chosen))


def _views(whole: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(part, requires_grad=False) for part in whole.split(2)]


def test_replaced_weights_are_noticed():
    of = parameters(2, 3)
    whole = joined(of)
    of[1].data = of[1].data.clone()
    assert not are_joined(of, whole)


def test_one_alone_is_itself():
    (of,) = parameters(3)
    assert addresses(joined([of])) == addresses(of)
