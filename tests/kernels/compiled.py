"""Compiles Triton kernels for GPUs that are not there: `python compiled.py MODULE` prints what each one takes.

A module of specimens has SPECIMENS: by name, a kernel, its signature, its constants, and options such as num_warps.
It runs in a process of its own, because the interpreter that the other tests use takes the compiler's place.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Specimen:
    """`signature`: Triton's type of each argument that is not a constant, such as "*bf16" or "i32"."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16, as Triton finds out by itself when it launches a kernel."""


def taken(module: str) -> dict[str, dict[str, dict[str, int]]]:
    """By name of the specimen and capability: registers of a thread, bytes of it that spill, bytes of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, module], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compile(specimen: Specimen, capability: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned}
    source = ASTSource(specimen.kernel, signature, constexprs=specimen.constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=specimen.options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(number) for key, number in re.findall(r"(REG|LOCAL|STACK):(\d+)", usage)}
    assert "REG" in numbers, usage
    return {
        "registers": numbers["REG"],
        "spilled": numbers["LOCAL"] + numbers["STACK"],
        "shared": int(made.metadata.shared),
    }


if __name__ == "__main__":
    specimens = importlib.import_module(sys.argv[1]).SPECIMENS
    print(json.dumps({name: {str(c): _compile(one, c) for c in CAPABILITIES} for name, one in specimens.items()}))
