"""Samples as a page holds them: a compressed block of JSON for each step, as many as its size allows."""

import base64
import gzip
import json
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from dppo_cli.errors import DppoError
from dppo_cli.telemetry.report.data import number

MOST_ALTERNATIVES = 10
"""Tokens shown of the top K."""
LARGEST_STEP = 3_000_000
"""Characters of a step's block: more takes a phone too long to unpack."""
SMALLEST_STEP = 1000
"""Characters below which there is no room for another step."""
TEXTS = ("answer", "completion", "status", "note")
NUMBERS = {"logp_mu": "mu", "logp_pi": "pi", "divergence": "d"}


@dataclass(frozen=True)
class Packed:
    """`blocks`: gzip as base64, by step. `kept` and `total`: samples by step.

    `steps_left_out` had no room. `problems`: files that could not be read.
    """

    blocks: dict[int, str]
    kept: dict[int, int]
    total: dict[int, int]
    steps_left_out: list[int]
    problems: list[str]

    @property
    def note(self) -> str | None:
        """What was left out, in words."""
        parts = []
        if cut := [step for step in self.blocks if self.kept[step] < self.total[step]]:
            left = sum(self.total[step] - self.kept[step] for step in cut)
            parts.append(f"{left} samples of {len(cut)} steps")
        if self.steps_left_out:
            parts.append(f"all samples of {len(self.steps_left_out)} of the kept steps")
        return f"Left out, to keep this file small: {' and '.join(parts)}." if parts else None


Whole = MutableMapping[Hashable, tuple[str, int]]
"""Block and number of samples of each file that was packed whole, for a page that is made again and again."""


def pack(
    steps: Sequence[int],
    samples: Callable[[int], Sequence[Any]],
    room: int,
    whole: Whole | None = None,
    file_of: Callable[[int], Hashable] = int,
) -> Packed:
    """Blocks of at most `room` characters together. The last and the first step come first, then those in between.

    `file_of`: another value whenever the samples of a step are others.
    """
    blocks, kept, total, left_out, problems = {}, {}, {}, [], []
    whole = {} if whole is None else whole
    for step in by_importance(steps):
        if room < SMALLEST_STEP:
            left_out.append(step)
            continue
        file = file_of(step)
        if file in whole and len(whole[file][0]) <= room:
            blocks[step], kept[step] = whole[file]
            total[step] = kept[step]
        else:
            try:
                rows = samples(step)
            except DppoError as error:
                problems.append(str(error))
                continue
            if not rows:
                continue
            block, n = _fitting(rows, min(room, LARGEST_STEP))
            if n == 0:
                left_out.append(step)
                continue
            blocks[step], kept[step], total[step] = block, n, len(rows)
            if n == len(rows):
                whole[file] = block, n
        room -= len(blocks[step])
    return Packed(dict(sorted(blocks.items())), kept, total, sorted(left_out), problems)


def by_importance(steps: Sequence[int]) -> list[int]:
    """The last, the first, the middle, and so on: whatever has no room, the others are spread over the run."""
    order = [len(steps) - 1, 0] if len(steps) > 1 else list(range(len(steps)))
    spans = [(0, len(steps) - 1)]
    while spans:
        spans = [
            part
            for low, high in spans
            if high - low > 1
            for part in ((low, (low + high) // 2), ((low + high) // 2, high))
        ]
        order += [high for low, high in spans[::2]]
    return [steps[i] for i in order]


def _fitting(rows: Sequence[Mapping[str, Any]], room: int) -> tuple[str, int]:
    """The block of as many rows as have room, and their number."""
    while rows:
        block = base64.b64encode(gzip.compress(_json(rows).encode(), 6, mtime=0)).decode()
        if len(block) <= room:
            return block, len(rows)
        # With some reserve, because rows differ in size.
        rows = rows[: min(len(rows) - 1, int(0.9 * len(rows) * room / len(block)))]
    return "", 0


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    """`texts`: of every token that is known, for the alternatives, of which only the id was kept."""
    texts: dict[int, str] = {}
    wanted: set[int] = set()
    prompts: dict[str, int] = {}
    found = []
    for row in rows:
        sample = _sample(row)
        sample["prompt"] = prompts.setdefault(_text(row.get("prompt")), len(prompts))
        if sample["ids"] and sample["tokens"]:
            texts.update(zip(sample["ids"], sample["tokens"], strict=True))
        if isinstance(known := row.get("top_texts"), dict):
            texts.update({int(i): _text(text) for i, text in known.items() if i.isdecimal()})
        for alternatives in sample["top"] or ():
            wanted.update(token for token, _, _ in alternatives)
        found.append(sample)
    return json.dumps(
        {"prompts": list(prompts), "texts": {i: texts[i] for i in sorted(wanted) if i in texts}, "samples": found},
        separators=(",", ":"),
        allow_nan=False,
    )


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose lists all have an entry for each token, or are None."""
    tokens = row.get("tokens") if isinstance(row.get("tokens"), list) else None
    ids = row.get("token_ids") if isinstance(row.get("token_ids"), list) else None
    n = len(tokens if tokens is not None else ids or [])
    parts = row.get("parts")
    sample: dict[str, Any] = {name: _text(row.get(name)) for name in TEXTS if row.get(name) is not None}
    sample |= {name: row.get(name) if isinstance(row.get(name), int | str) else None for name in ("problem", "sample")}
    sample |= {name: _rounded(row.get(name)) for name in ("score", "advantage")}
    sample["parts"] = {_text(k): _rounded(v) for k, v in parts.items()} if isinstance(parts, dict) else None
    sample["n"] = n
    sample["tokens"] = [_text(token) for token in tokens] if tokens is not None else None
    whole = _list(row, "token_ids", n)
    sample["ids"] = whole if whole and all(isinstance(i, int) for i in whole) else None
    for name, short in NUMBERS.items():
        values = _list(row, name, n)
        sample[short] = [_rounded(value) for value in values] if values else None
    for name, short in (("keep", "keep"), ("filtered", "filtered"), ("sampled", "sampled")):
        values = _list(row, name, n)
        sample[short] = [None if v is None else int(bool(v)) for v in values] if values else None
    sample["top"] = _alternatives(row, n)
    return sample


def _alternatives(row: Mapping[str, Any], n: int) -> list[list[list[Any]]] | None:
    """For each token [id, log mu, log pi] of the likeliest under mu."""
    ids, mu, pi = (_list(row, name, n) for name in ("top_ids", "top_logp_mu", "top_logp_pi"))
    if not ids or not mu:
        return None
    found = []
    for i in range(n):
        columns = [c[i] if c and isinstance(c[i], list) else [] for c in (ids, mu, pi)]
        columns[2] = columns[2] or [None] * len(columns[0])
        rows = zip(*columns, strict=False)
        found.append([[t, _rounded(a), _rounded(b)] for t, a, b in rows if isinstance(t, int)][:MOST_ALTERNATIVES])
    return found


def _list(row: Mapping[str, Any], name: str, n: int) -> list[Any] | None:
    value = row.get(name)
    return value if isinstance(value, list) and len(value) == n else None


def _text(value: Any) -> str:
    """A conversation, or anything else that is not text, as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _rounded(value: Any) -> float | None:
    found = number(value)
    return None if found is None else float(f"{found:.4g}")
