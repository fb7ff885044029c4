"""samples/step-N.jsonl of a run: what the model wrote, and what the trust region did to each token.

A line for each completion of some groups of a step. Log-probs and divergence are those of the first update that a token
was in. They are a help and not the run: what fails here is told once.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dppo_cli.config.sections import SamplesKept
from dppo_cli.training.files import as_count
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Completion, Group, SampleStats

DIGITS = 6
"""Of a number. What was computed in float32 has little more than seven."""


class StepSamples:
    """Keeps the samples of every `every` steps, of the first and of the last one.

    When the next file would make the folder larger than `max_mib`, `stride` is doubled: from then on there are files of
    half as many steps, and of those that are there every other one is removed. So a run of any length is covered
    evenly. What is removed follows from the sizes of all files since the start alone, so `state()` has them: a run that
    was stopped and resumed ends with the same files as one that was not.
    """

    def __init__(
        self,
        plan: SamplesKept,
        steps: int,
        decode: Callable[[Sequence[int]], str],
        warn: Callable[[str], None],
        *,
        whole_prompts: bool = True,
    ) -> None:
        """`steps`: of the run. `decode`: token ids as text, with special tokens.

        `whole_prompts`: prompts as the model gets them; else the problem's own text alone.
        """
        self.plan, self.steps, self.decode, self.warn = plan, steps, decode, warn
        self.whole_prompts = whole_prompts
        self.stride = 1
        self.sizes: dict[int, int] = {}  # bytes of each file, by step
        self.told = False
        self.texts: dict[int, str] = {}  # of single tokens

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"stride": self.stride, "sizes": [list(item) for item in self.sizes.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError, TypeError or KeyError for what `state` does not give."""
        self.stride = as_count(state["stride"], least=1)
        self.sizes = {as_count(step): as_count(size) for step, size in state["sizes"]}

    def chosen(self, step: int, groups: Sequence[Group]) -> list[Group]:
        """All groups, those to be kept marked: of those that teach something, then of those that do not.

        They are spread over the step, because groups of its first update show no trust region: pi is mu there.
        """
        if not self._is_due(step):
            return list(groups)
        teaching = [g for g, group in enumerate(groups) if any(group.advantages)]
        others = [g for g, group in enumerate(groups) if not any(group.advantages)]
        kept = set(_spread(teaching, self.plan.groups))
        kept |= set(_spread(others, self.plan.groups - len(kept)))
        return [replace(group, kept=g in kept) for g, group in enumerate(groups)]

    def keep(self, folder: RunFolder, step: int, groups: Sequence[Group], updates: Sequence[UpdateResult]) -> None:
        """Write the samples of the groups that are marked. Never raises: what fails is told once."""
        kept = [group for group in groups if group.kept]
        if not kept:
            return
        try:
            rows = self._rows(step, kept, _first(updates))
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            if self._make_room(folder, step, len(lines)):
                folder.write_samples(step, lines)
        except Exception as error:  # whatever a tokenizer or a disk may raise
            why = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            self._tell(f"the samples of step {step} could not be written: {why}; the run goes on without them")

    def _is_due(self, step: int) -> bool:
        every = self.plan.every * self.stride
        return every > 0 and (step in (1, self.steps) or step % every == 0)

    def _make_room(self, folder: RunFolder, step: int, size: int) -> bool:
        """Whether the samples of this step are to be written, now that those of others were removed where needed."""
        limit = self.plan.max_mib * 2**20
        if self.sizes.get(1, 0) + size > limit:
            self._tell(
                f"the samples of step {step} are not kept: they take {size / 2**20:.3g} MiB, which samples.max_mib="
                f"{self.plan.max_mib:g} has no room for; lower samples.groups={self.plan.groups}"
            )
            return False
        while sum(self.sizes.values()) + size > limit:
            self.stride *= 2
            removed = [kept for kept in self.sizes if kept != 1 and kept % (self.plan.every * self.stride)]
            folder.remove_samples(removed)
            for kept in removed:
                del self.sizes[kept]
        if not self._is_due(step):
            return False
        self.sizes[step] = size
        return True

    def _tell(self, text: str) -> None:
        if not self.told:
            self.told = True
            self.warn(text)

    def _rows(self, step: int, groups: Sequence[Group], seen: dict[int, SampleStats]) -> Iterator[dict[str, Any]]:
        for group in groups:
            own = group.prompt.example.prompt
            prompt = _text(self.decode(group.prompt.token_ids) if self.whole_prompts else own)
            samples = zip(group.completions, group.scores, group.advantages, strict=True)
            for g, (completion, score, advantage) in enumerate(samples):
                token_ids = completion.token_ids_T.tolist()
                yield {
                    "step": step,
                    "problem": group.prompt.index,
                    "sample": g,
                    "prompt": prompt,
                    "answer": _text(group.prompt.example.answer),
                    "completion": _text(completion.text),
                    "status": completion.status.value,
                    "score": _number(score.value),
                    "parts": {_text(name): _number(value) for name, value in score.parts.items()},
                    "note": _text(score.note),
                    "advantage": _number(advantage),
                    "token_ids": token_ids,
                    "tokens": [self._text_of(token) for token in token_ids],
                    **_columns(completion, seen.get(id(completion))),
                    "top_texts": self._texts_of(completion.mu.topk_ids_NK),
                }

    def _text_of(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = _text(self.decode([token]))
        return self.texts[token]

    def _texts_of(self, token_NK: Tensor | None) -> dict[str, str] | None:
        """By id: JSON has no other keys than text."""
        if token_NK is None:
            return None
        return {str(token): self._text_of(token) for token in token_NK.unique().tolist()}


def _spread(items: Sequence[int], count: int) -> list[int]:
    """The middle of each of `count` equal parts, or all where there are no more."""
    if count >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _first(updates: Sequence[UpdateResult]) -> dict[int, SampleStats]:
    """What the first update that saw it found of each completion, by its identity."""
    found: dict[int, SampleStats] = {}
    for update in updates:
        for stats in update.kept:
            found.setdefault(id(stats.completion), stats)
    return found


def _columns(completion: Completion, found: SampleStats | None) -> dict[str, Any]:
    """What is known of each token. A token that the model did not sample has None, or an empty list."""
    sampled, mu = completion.sampled_T.tolist(), completion.mu
    n = len(mu.logp_N)

    def spread(of_sampled: Iterable[Any] | None, other: Any = None) -> list[Any]:
        values = iter([other] * n if of_sampled is None else of_sampled)
        return [next(values) if is_sampled else other for is_sampled in sampled]

    def numbers(value_N: Tensor | None) -> list[Any]:
        return spread(None if value_N is None else map(_number, value_N.tolist()))

    def lists(value_NK: Tensor) -> list[Any]:
        return spread(([_number(value) for value in row] for row in value_NK.tolist()), [])

    seen = None if found is None else found.tokens
    columns: dict[str, Any] = {
        "sampled": sampled,
        "logp_mu": numbers(mu.logp_N),
        "logp_pi": numbers(None if seen is None else mu.logp_N + seen.log_ratio_N),
        "divergence": numbers(None if seen is None else seen.divergence_N),
        "keep": spread(None if seen is None else seen.keep_N.tolist()),
        "filtered": spread(None if seen is None else seen.filtered_N.tolist()),
    }
    if mu.topk_ids_NK is None or mu.topk_logp_NK is None:
        return {**columns, "top_ids": None, "top_logp_mu": None, "top_logp_pi": None}
    top_logp_pi_NK = None if found is None else found.topk_logp_pi_NK
    return {
        **columns,
        "top_ids": spread(mu.topk_ids_NK.tolist(), []),
        "top_logp_mu": lists(mu.topk_logp_NK),
        "top_logp_pi": lists(torch.full_like(mu.topk_logp_NK, torch.nan) if top_logp_pi_NK is None else top_logp_pi_NK),
    }


def _number(value: float | None) -> float | None:
    """Rounded; None where JSON has no such number."""
    return float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None


def _text(text: str) -> str:
    """With a replacement character for each half of a pair that stands alone, which many readers of JSON refuse."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
