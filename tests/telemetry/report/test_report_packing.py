"""Samples in blocks: what is kept of a line, in which order steps get room."""

import base64
import gzip
import json
from typing import Any

from report_runs import sample

from dppo_cli.errors import RunError
from dppo_cli.telemetry.report.packing import by_importance, pack


def unpacked(block: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(block)))


def test_the_last_and_the_first_step_come_first_and_then_those_in_between() -> None:
    assert by_importance([10, 20, 30, 40, 50]) == [50, 10, 30, 20, 40]
    assert sorted(by_importance(list(range(37)))) == list(range(37))
    assert by_importance([3]) == [3] and by_importance([]) == [] and by_importance([1, 2]) == [2, 1]


def test_a_sample_is_kept_whole() -> None:
    row = sample(["a", "b"], parts={"exact": 1.0, "form": None})
    packed = pack([4], lambda step: [row], 10**6)
    found = unpacked(packed.blocks[4])
    assert found["prompts"] == ["What is 3+4?"]
    (kept,) = found["samples"]
    assert (kept["prompt"], kept["n"], kept["tokens"], kept["ids"]) == (0, 2, ["a", "b"], [0, 1])
    assert (kept["d"], kept["keep"]) == ([0.15, 0.3], [1, 0])
    assert kept["top"][1] == [[1, -1.0, -0.9], [0, -2.0, -2.1], [99, -3.0, -3.1]]
    assert found["texts"] == {"0": "a", "1": "b"}  # token 99 was never sampled
    assert kept["parts"] == {"exact": 1.0, "form": None} and packed.note is None


def test_lists_that_do_not_fit_are_left_out() -> None:
    """Of the user's own making, or of another version."""
    odd = {"divergence": [0.1], "keep": "yes", "logp_mu": [float("nan"), None], "top_ids": None, "token_ids": ["x", 2]}
    (kept,) = unpacked(pack([1], lambda step: [sample(["a", "b"], **odd)], 10**6).blocks[1])["samples"]
    assert kept["d"] is None and kept["keep"] is None and kept["top"] is None and kept["ids"] is None
    assert kept["mu"] == [None, None] and len(kept["pi"]) == 2
    (bare,) = unpacked(pack([1], lambda step: [{"completion": "hello"}], 10**6).blocks[1])["samples"]
    assert (bare["completion"], bare["n"], bare["tokens"], bare["score"]) == ("hello", 0, None, None)


def test_what_has_no_room_is_counted() -> None:
    rows = [sample([f"{i * j * 7919 % 1000}" for j in range(200)], sample=i) for i in range(10)]
    whole = pack([1, 2, 3], lambda step: rows, 10**6)
    size = len(whole.blocks[1])
    packed = pack([1, 2, 3], lambda step: rows, int(1.6 * size))
    assert packed.kept[3] == 10 and 0 < packed.kept[1] < 10 and packed.kept.get(2, 0) < packed.kept[1]
    assert sum(map(len, packed.blocks.values())) <= 1.6 * size
    assert packed.note is not None and packed.note.startswith("Left out, to keep this file small: ")
    assert pack([1, 2, 3], lambda step: rows, 10).steps_left_out == [1, 2, 3]


def test_a_damaged_file_is_a_problem_and_the_others_are_kept() -> None:
    def samples(step: int) -> list[dict[str, Any]]:
        if step == 2:
            raise RunError("samples/step-2.jsonl is damaged")
        return [sample(["a"])]

    packed = pack([1, 2, 3], samples, 10**6)
    assert sorted(packed.blocks) == [1, 3] and packed.problems == ["samples/step-2.jsonl is damaged"]


def test_what_was_packed_before_is_not_read_again() -> None:
    read: list[int] = []

    def samples(step: int) -> list[dict[str, Any]]:
        read.append(step)
        return [sample([f"{step}"])]

    whole: dict[Any, tuple[str, int]] = {}
    first = pack([1, 2], samples, 10**6, whole)
    again = pack([1, 2, 3], samples, 10**6, whole)
    assert read == [2, 1, 3] and again.kept == {1: 1, 2: 1, 3: 1}
    assert {step: again.blocks[step] for step in (1, 2)} == first.blocks
    pack([1, 2], samples, 10**6, whole, file_of=lambda step: (step, "changed"))
    assert read == [2, 1, 3, 2, 1]
