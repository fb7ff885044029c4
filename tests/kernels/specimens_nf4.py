"""The product with NF4 weights in the shapes of Llama 3.1 8B. See compiled.py."""

from compiled import Specimen

from dppo_cli.kernels.fused.nf4 import FEW, choose, nf4_product, words_of
from dppo_cli.kernels.fused.nf4_product import H100

SIGNATURE = {
    **dict.fromkeys(("x_ptr", "low_ptr", "b_ptr", "bias_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("absmax_ptr", "table_ptr", "scale_ptr", "part_ptr"), "*fp32"),
    **dict.fromkeys(("code_ptr", "count_ptr", "rows"), "i32"),
}
SIGNATURE |= dict.fromkeys(("code_ptr", "count_ptr"), "*i32")
LAYERS = {
    "q k v": ((4096, 1024, 1024), 4096),
    "down": ((4096,), 14336),
}


def product(sizes: tuple[int, ...], inputs: int, rows: int, wide: bool) -> Specimen:
    how = choose(sizes, inputs, rows, H100, wide)
    constants = {
        "INPUTS": inputs,
        **dict(zip(("SIZE_0", "SIZE_1", "SIZE_2"), (*sizes, 0, 0), strict=False)),
        "RANK": 32,
        "BIAS": False,
        "OUTPUT_BLOCK": how.outputs,
        "ROW_BLOCK": how.rows,
        "SPLITS": how.splits,
        "WORDS": words_of(inputs),
        "WARPS": how.warps,
        "STAGES": how.stages,
        "WIDE": wide or how.rows == FEW,
        "FULL": True,
    }
    aligned = tuple(name for name in SIGNATURE if name != "rows")
    return Specimen(nf4_product, SIGNATURE, constants, {"num_warps": how.warps}, aligned)


CHOSEN = ((8, "down"), (16, "down"), (64, "q k v"), (128, "down"))
SPECIMENS = {
    f"{rows} {name}{', wide' if wide else ''}": product(*LAYERS[name], rows, wide)
    for rows, name in CHOSEN
    for wide in (False, True)
}
