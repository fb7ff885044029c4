"""What tests of exports share: the table that `dppo export` shows, and logits of a base model."""

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

IDS = [[3, 4, 13, 5, 6, 15], [9, 14, 10, 15, 3, 3]]


def figure(output: str, row: str) -> float:
    """The first number in a row of the table."""
    match = re.search(rf"{row}[^│]*│\s*([-+.e\d]+)", output)
    assert match, output
    return float(match.group(1))


def difference(output: str) -> float:
    return figure(output, "largest logit difference")


@torch.no_grad()
def base_logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=torch.tensor(IDS)).logits
