"""Rewards of the benchmarks."""


def contains_answer(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 where the completion contains the answer, else 0."""
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


def every_other(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """1, 0, 1, 0, ...: with random weights no answer is right, and samples of equal reward would be skipped."""
    return [float(i % 2) for i in range(len(completions))]
