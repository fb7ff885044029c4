"""Weights that become views of one tensor."""

import pytest
import torch
from recording import addresses
from torch import Tensor, nn

from dppo_cli.kernels.joined import ROOM, are_joined, joined


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


def test_room_behind_them_is_found_again():
    """At the same addresses, by the last of them, with as much of it as is wanted."""
    of = parameters(3, 2)
    before = torch.cat([p.data for p in of])
    whole = joined(of, 4)
    assert whole.shape == (9, 4) and torch.equal(whole[:5], before) and not whole[5:].any() and are_joined(of, whole)
    storage = of[0].untyped_storage()
    assert storage.nbytes() == whole.nbytes
    whole[5:] = 7
    for room in (4, 1, 0):
        again = joined(of, room)
        assert addresses(again, *of) == addresses(whole, *of) and again.shape == (5 + room, 4)
        assert torch.equal(again, whole[: 5 + room]) and are_joined(of, again)
    assert addresses(joined(of[1:], 4)) == addresses(of[1])
    assert torch.equal(torch.cat([p.data for p in of]), before)


@pytest.mark.parametrize("of_them", [slice(0, 1), slice(0, 2)], ids=["before another", "with too little behind"])
def test_no_room_is_taken_from_others(of_them):
    of = parameters(2, 2)
    before, old = [p.data.clone() for p in of], joined(of, 2)
    whole = joined(of[of_them], 3)
    assert whole.data_ptr() != old.data_ptr() and not whole[-3:].any()
    whole[-3:] = 7
    assert all(torch.equal(p.data, values) for p, values in zip(of, before, strict=True))


def test_a_tensor_where_one_with_room_was_has_none():
    """An allocator gives addresses again."""
    (of,) = parameters(2)
    whole = joined([of], 1)
    of.data = whole[:2].clone()
    setattr(of, ROOM, (of.data_ptr(), 1))
    storage = of.data.untyped_storage()
    again = joined([of], 1)
    assert again.shape == (3, 4) and again.data_ptr() == of.data_ptr() and torch.equal(of.data, whole[:2])
    assert storage.nbytes() == 2 * 4 * 4, "it did not grow"


def test_one_alone_may_have_room():
    (of,) = parameters(3)
    values = of.data.clone()
    whole = joined([of], 2)
    assert addresses(whole) == addresses(of) and torch.equal(of.data, values) and of.shape == (3, 4)
