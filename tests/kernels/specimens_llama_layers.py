"""The elementwise kernels in the shapes of Llama 3.1 8B, in an update and in a decoding step. See compiled.py."""

from compiled import Specimen

from dppo_cli.kernels.fused.gated import BLOCK, gated_backward, gated_forward
from dppo_cli.kernels.fused.norm import norm_backward, norm_forward
from dppo_cli.kernels.fused.rotary import rotate_both

UNFUSED = {"enable_fp_fusion": False}
HIDDEN = {"SIZE": 4096, "BLOCK": 4096, "ROWS": 1}
HEAD = {"SIZE": 128, "BLOCK": 128, "ROWS": 32}
SEVEN_EIGHTHS = {"SIZE": 3584, "BLOCK": 4096, "ROWS": 1}
FORWARD = {
    **dict.fromkeys(("x_ptr", "delta_ptr", "weight_ptr", "sum_ptr", "out_ptr"), "*bf16"),
    "scale_ptr": "*fp32",
    **dict.fromkeys(("rows", "x_stride", "delta_stride"), "i32"),
    "eps": "fp32",
}
BACKWARD = {
    **dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "out_ptr"), "*bf16"),
    "scale_ptr": "*fp32",
    **dict.fromkeys(("rows", "grad_stride", "x_stride"), "i32"),
}
POINTERS = ("q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
STRIDES = [f"{x}_{of}_stride" for x in ("q", "k") for of in ("sequence", "head", "position")]
STRIDES += [f"{x}_{of}_stride" for x in ("cos", "sin") for of in ("sequence", "position")]
ROTATION = {
    **dict.fromkeys(POINTERS, "*bf16"),
    "positions": "i32",
    **dict.fromkeys(STRIDES, "i32"),
    "eps": "fp32",
}
HEADS = {"Q": 32, "K": 8, "HALF": 64, "REST": 0, "BLOCK": 64, "REST_BLOCK": 1, "ROUNDS": True}
NORM = {"ROUNDS": True, "OFFSET": 0.0}
GATES = {
    **dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("gate_stride", "up_stride", "size"), "i32"),
}
GATES_BACK = {
    **dict.fromkeys(("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr"), "*bf16"),
    **dict.fromkeys(("grad_stride", "gate_stride", "up_stride", "size"), "i32"),
}


def norm_of(shape: dict[str, int], adds: bool = False, keeps: bool = False) -> Specimen:
    aligned = tuple(name for name in FORWARD if name not in ("rows", "eps"))
    return Specimen(
        norm_forward, FORWARD, {**shape, **NORM, "ADDS": adds, "KEEPS": keeps}, {"num_warps": 8, **UNFUSED}, aligned
    )


def norm_back(shape: dict[str, int]) -> Specimen:
    aligned = tuple(name for name in BACKWARD if name != "rows")
    return Specimen(norm_backward, BACKWARD, {**shape, **NORM}, {"num_warps": 8, **UNFUSED}, aligned)


def rotation(rows: int, norm: bool = False, back: bool = False) -> Specimen:
    of = {**HEADS, "ROWS": rows, "NORM": norm, "NORM_ROUNDS": True, "OFFSET": 0.0, "BACK": back}
    options = {"num_warps": rows // 4, **UNFUSED}
    return Specimen(rotate_both, ROTATION, of, options, (*POINTERS, *STRIDES))


SPECIMENS = {
    "norm": norm_of(HIDDEN, keeps=True),
    "norm of heads": norm_of(HEAD, keeps=True),
    "norm, 3584": norm_of(SEVEN_EIGHTHS, keeps=True),
    "norm of a sum": norm_of(HIDDEN, adds=True),
    "norm, backward": norm_back(HIDDEN),
    "norm of heads, backward": norm_back(HEAD),
    "rotation": rotation(32),
    "rotation, backward": rotation(32, back=True),
    "rotation of norms": rotation(32, norm=True),
    **{
        f"{name}{more}": Specimen(kernel, of, {"BLOCK": BLOCK, "GELU": name == "geglu"}, UNFUSED, tuple(of))
        for name in ("swiglu", "geglu")
        for more, kernel, of in (("", gated_forward, GATES), (", backward", gated_backward, GATES_BACK))
    },
}
