"""Rewards of the benchmarks."""


def contains_answer(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 where the completion contains the answer, else 0."""
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


def all_differ(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """0 to 7, again and again: every sample of a group of 8 has an advantage, so that none is skipped."""
    return [float(i % 8) for i in range(len(completions))]


def every_other(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """0, 1, 0, 1, ...: no answer of a random model is right, and samples with equal rewards would be skipped."""
    return [float(i % 2) for i in range(len(completions))]
