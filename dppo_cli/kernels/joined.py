"""Weights of layers that read one input, one below the other in memory, so that one product can serve them all."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All their rows as one tensor, of which the parameters, equally shaped but for that, become views.

    It takes no memory once the old ones are freed. Parameters that are such views already stay as they are.
    """
    # In inference mode, too, training goes on with them.
    with torch.inference_mode(parameters[0].is_inference()):
        parts = [parameter.detach().as_subclass(Tensor) for parameter in parameters]
        first = parts[0]
        shape = (sum(map(len, parts)), *first.shape[1:])
        if _follow_each_other(parts):
            return first.new_empty(0).set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())
        whole = torch.cat(parts)
        for parameter, view in zip(parameters, whole.split([len(part) for part in parts]), strict=True):
            parameter.data = view
        return whole


def are_joined(parameters: Sequence[nn.Parameter], whole: Tensor) -> bool:
    """Whether they still are what `joined` made them."""
    addresses = [parameter.data_ptr() for parameter in parameters]
    return addresses == [part.data_ptr() for part in whole.split([len(parameter) for parameter in parameters])]


def _follow_each_other(parts: Sequence[Tensor]) -> bool:
    ends = [part.data_ptr() + part.nbytes for part in parts]
    same = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return same and ends[:-1] == [part.data_ptr() for part in parts[1:]] and all(p.is_contiguous() for p in parts)
