"""Weights of layers that read one input, one below the other in memory, so that one product can serve them all."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROOM = "room_behind"
"""Of a parameter that `joined` left room behind: its address then, and how many rows."""


def joined(parameters: Sequence[nn.Parameter], room: int = 0) -> Tensor:
    """All their rows and `room` more as one tensor, of which the parameters, equally shaped but for that, become views.

    But for the room it takes no memory once the old ones are freed. Parameters that are such views already stay as they
    are, if they were joined with as much room: it is the same for all that ask. It begins as zeros.
    """
    # In inference mode, too, training goes on with them.
    with torch.inference_mode(parameters[0].is_inference()):
        parts = [parameter.detach().as_subclass(Tensor) for parameter in parameters]
        first, last, sizes = parts[0], parameters[-1], [len(part) for part in parts]
        shape = (sum(sizes) + room, *first.shape[1:])
        if _follow_each_other(parts) and room <= _room_behind(last):
            return first.new_empty(0).set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())
        whole = torch.cat([*parts, first.new_zeros(room, *first.shape[1:])])
        for parameter, view in zip(parameters, whole[: sum(sizes)].split(sizes), strict=True):
            parameter.data = view
        if room:
            setattr(last, ROOM, (last.data_ptr(), room))
        return whole


def are_joined(parameters: Sequence[nn.Parameter], whole: Tensor) -> bool:
    """Whether they still are what `joined` made them."""
    addresses, sizes = [parameter.data_ptr() for parameter in parameters], [len(parameter) for parameter in parameters]
    return addresses == [part.data_ptr() for part in whole[: sum(sizes)].split(sizes)]


def _follow_each_other(parts: Sequence[Tensor]) -> bool:
    ends = [part.data_ptr() + part.nbytes for part in parts]
    same = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return same and ends[:-1] == [part.data_ptr() for part in parts[1:]] and all(p.is_contiguous() for p in parts)


def _room_behind(parameter: nn.Parameter) -> int:
    """Rows. None, if the parameter lies elsewhere by now, or another tensor where it lay."""
    address, rows = getattr(parameter, ROOM, (0, 0))
    end = (parameter.storage_offset() + parameter.numel() + rows * parameter[0].numel()) * parameter.itemsize
    return rows if address == parameter.data_ptr() and end <= parameter.untyped_storage().nbytes() else 0
