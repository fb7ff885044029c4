"""The kernels of a decoding step's attention in the shapes of Llama 3.1 8B, and with other heads. See compiled.py."""

from compiled import Specimen

from dppo_cli.kernels.fused.attention import (
    MOST_CHUNKS,
    TILE,
    attend_to_chunks,
    loads,
    sum_chunks,
    warps_of,
    write_states,
)

ATTENTION = {
    **dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), "*bf16"),
    **dict.fromkeys(("prompt_ptr", "own_ptr", "prompt_used_ptr", "own_used_ptr"), "*i64"),
    **dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32"),
    "scale": "fp32",
    **dict.fromkeys(("rows", "prompt_chunk", "own_chunk", "prompt_chunks", "chunks"), "i32"),
}
SUM = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "chunks": "i32"}
WRITE = {
    **dict.fromkeys(("keys_ptr", "values_ptr", "new_keys_ptr", "new_values_ptr"), "*bf16"),
    "at_ptr": "*i64",
    **dict.fromkeys(("key_row_stride", "key_head_stride", "value_row_stride", "value_head_stride"), "i32"),
}


def attention(key_heads: int, query_heads: int, size: int) -> Specimen:
    shape = {"K": key_heads, "Q": query_heads, "D": size, "TILE": TILE, **loads(size)}
    aligned = tuple(name for name in ATTENTION if name.endswith("_ptr"))
    return Specimen(attend_to_chunks, ATTENTION, shape, {"num_warps": 4}, aligned)


def of_chunks(chunks: int) -> Specimen:
    aligned = ("part_ptr", "lse_ptr", "out_ptr")
    return Specimen(sum_chunks, SUM, {"D": 128, "CHUNKS": chunks}, {"num_warps": warps_of(128 * chunks)}, aligned)


SPECIMENS = {
    "attention": attention(8, 4, 128),
    "attention, heads of 64": attention(2, 7, 64),
    "attention, heads of 256": attention(4, 2, 256),
    "sum": of_chunks(8),
    "sum, all chunks": of_chunks(2 * MOST_CHUNKS),
    "write": Specimen(write_states, WRITE, {"K": 8, "D": 128, "BLOCK": 1024}, aligned=tuple(WRITE)),
}
