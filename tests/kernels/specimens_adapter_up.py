"""The addition of the adapter in the shapes of Llama 3.1 8B. See compiled.py."""

from compiled import Specimen

from dppo_cli.kernels.fused.adapter_up import MOST_RANK, OUTPUT_BLOCK, adapter_up

SIGNATURE = {
    **dict.fromkeys(("out_ptr", "b_ptr"), "*bf16"),
    **dict.fromkeys(("rows", "stride"), "i32"),
    **dict.fromkeys(("scale_0", "scale_1", "scale_2"), "fp32"),
}
LAYERS = {"q k v": (4096, 1024, 1024), "gate up": (14336, 14336, 0), "odd": (896, 128, 100)}


def added(sizes: tuple[int, int, int], rank: int, row_block: int) -> Specimen:
    constants = {
        **dict(zip(("SIZE_0", "SIZE_1", "SIZE_2"), sizes, strict=True)),
        "RANK": rank,
        "RANKS": 32 if rank <= 32 else MOST_RANK,
        "OUTPUT_BLOCK": OUTPUT_BLOCK,
        "ROW_BLOCK": row_block,
    }
    return Specimen(adapter_up, SIGNATURE, constants, {"num_warps": 4}, ("out_ptr", "b_ptr", "stride"))


SPECIMENS = {
    f"{name}, rank {rank}, {row_block} rows": added(LAYERS[name], rank, row_block)
    for name, rank, row_block in (
        ("q k v", 32, 16),
        ("gate up", 32, 16),
        ("gate up", 32, 32),
        ("gate up", 32, 64),
        ("q k v", MOST_RANK, 16),
        ("q k v", MOST_RANK, 64),
        ("odd", 24, 16),
    )
}
