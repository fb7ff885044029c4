"""How sure an accuracy is: bootstrap intervals over problems, and the paired difference of two evaluations.

Samples of one problem are not independent, so whole problems are drawn, with replacement (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, section 13.3: the percentile interval). The draws do not depend on the run's seed:
equal results have equal intervals. P problems, R draws of P problems each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
DRAWS = 4000
AT_ONCE = 2**22
"""Problems drawn at once: 32 MiB of indices."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Mean over problems of what a second evaluation's share of right samples is above the first's, in [-1, 1].

    Example: `Difference(0.25, (0.1, 0.4), problems=20)`: 25 points better, with 95% confidence 10 to 40.
    """

    mean: float
    interval: Interval | None  # None: fewer than two problems, or the same difference in all
    problems: int  # judged in both


def accuracy_interval(right: Sequence[float], judged: Sequence[float]) -> Interval | None:
    """95% interval of sum(right) / sum(judged), where problem p has `judged[p]` >= 1 samples, `right[p]` of them right.

    Where every problem is solved, or none is, a bootstrap has nothing to draw from; then it is the exact binomial
    interval of so many problems (Clopper and Pearson, 1934). None if there is no interval to be had: fewer than two
    problems, or all of them solved equally often.
    """
    total = sum(right) / sum(judged) if judged else 0.5
    far = (1 - LEVEL) / 2
    if len(right) >= 2 and total in (0.0, 1.0):
        bound = far ** (1 / len(right))
        return (0.0, 1 - bound) if total == 0.0 else (bound, 1.0)
    return _bootstrap(right, judged)


def paired_difference(before: Sequence[float | None], after: Sequence[float | None]) -> Difference | None:
    """Two evaluations of the same problems, each as the share of right samples by problem (None: not judged).

    Comparing problem with problem removes what is hard for both, which makes the interval shorter than that of two
    separate accuracies. None if no problem was judged in both.
    """
    pairs = zip(before, after, strict=True)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    if not differences:
        return None
    interval = _bootstrap(differences, [1.0] * len(differences))
    return Difference(sum(differences) / len(differences), interval, len(differences))


def _bootstrap(value: Sequence[float], weight: Sequence[float]) -> Interval | None:
    """Of sum(value) / sum(weight). None for fewer than two problems, and where all are alike."""
    if len({v / w for v, w in zip(value, weight, strict=True)}) < 2:
        return None
    value_P, weight_P = (torch.tensor(column, dtype=torch.float64) for column in (value, weight))
    draws = [value_P[drawn_RP].sum(-1) / weight_P[drawn_RP].sum(-1) for drawn_RP in _drawn(len(value))]
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.cat(draws).quantile(ends).tolist()
    return low, high


def _drawn(problems: int) -> Iterator[Tensor]:
    """Numbers of problems, int64 [R', P], until there are R rows."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, AT_ONCE // problems)
    for start in range(0, DRAWS, rows):
        yield torch.randint(problems, (min(rows, DRAWS - start), problems), generator=generator)
