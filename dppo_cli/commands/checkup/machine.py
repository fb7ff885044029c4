"""What `dppo doctor` says of the machine: its devices and memory, and what was tried on them.

torch and what is built on it are imported inside functions, because they may be what is broken.
"""

import math
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row, first_line
from dppo_cli.config.sections import Hardware, Model
from dppo_cli.errors import ConfigError

GIB = 2**30
LITTLE = 1.0
"""GiB of memory below which a run of the embedded model may fail."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""
SMI_SECONDS, NF4_SECONDS = 10.0, 60.0
NF4 = """\
import sys, torch, bitsandbytes.functional as functional
device = "cuda" if sys.argv[1] != "cpu" and torch.cuda.is_available() else "cpu"
w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
packed, state = functional.quantize_4bit(w, quant_type="nf4")
print(device, float((functional.dequantize_4bit(packed, state) - w).abs().mean()))
"""
NF4_ERROR = 0.1
"""Mean error of normal numbers in 4 bits: 0.073 if it is right."""
QUESTION, ANSWER = "12+34=", "4"
"""What the embedded model knows best to write, the first digit of 46."""


def processor() -> Iterator[Row]:
    import torch

    from dppo_cli.kernels.products import has_avx512, has_onednn

    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    facts: dict[str, Any] = {
        "model": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "quota": quota,
        "avx512": has_avx512(),
        "onednn": has_onednn(cpu, torch.float32),
        "bfloat16": has_onednn(cpu, torch.bfloat16),
    }
    able = ", ".join(
        f"{name} {'yes' if facts[key] else 'no'}"
        for key, name in (("avx512", "AVX-512"), ("bfloat16", "bfloat16"), ("onednn", "oneDNN"))
    )
    text = f"{facts['model']}; torch uses {facts['threads']} of {cores} cores; {able}"
    told = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    if quota is not None and quota < facts["threads"]:
        fix = f"export OMP_NUM_THREADS={max(1, int(quota))}"
        yield Row("processor", WARNING, f"{text}, but this container may use {quota:g}: slow", fix, facts)
    elif told and 2 * facts["threads"] <= cores:
        yield Row("processor", WARNING, f"{text}, because {told[0]} is set", f"unset {' '.join(told)}", facts)
    else:
        yield Row("processor", OK, text, facts=facts)


def memory() -> Iterator[Row]:
    import psutil

    found, limit = psutil.virtual_memory(), _read(CGROUP / "memory.max")
    total, free = found.total / GIB, found.available / GIB
    text = f"{total:.1f} GiB, {free:.1f} GiB free"
    facts: dict[str, Any] = {"total_gib": total, "free_gib": free, "limit_gib": None}
    if limit.isdigit() and int(limit) < found.total:
        facts["limit_gib"] = int(limit) / GIB
        text += f"; this container may use {facts['limit_gib']:.1f} GiB"
    if min(free, facts["limit_gib"] or free) < LITTLE:
        yield Row("memory", WARNING, f"{text}: hardly enough for the embedded model", facts=facts)
    else:
        yield Row("memory", OK, text, facts=facts)


def gpus() -> Iterator[Row]:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    driver, built_for = _driver(), getattr(torch.version, "cuda", None)
    if not found and driver is None:
        yield Row("gpu", OK, "none; training runs on the CPU", facts={"count": 0})
    elif not found and built_for is None:
        text = f"the driver {driver} is installed, but this torch is a CPU build"
        yield Row("gpu", WARNING, text, f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]}")
    elif not found:
        why = f": {said[-1].message}" if said else ""
        text = f"torch, built for CUDA {built_for}, sees none, although the driver {driver} is installed{why}"
        yield Row("gpu", WARNING, text, "nvidia-smi")
    for i in range(torch.cuda.device_count() if found else 0):
        yield _gpu(i, driver, built_for)


def _gpu(i: int, driver: str | None, built_for: str | None) -> Row:
    import torch

    name = f"gpu {i}"
    try:
        with torch.cuda.device(i):
            about = torch.cuda.get_device_properties(i)
            facts = {
                "name": about.name,
                "total_gib": about.total_memory / GIB,
                "free_gib": torch.cuda.mem_get_info(i)[0] / GIB,
                "compute_capability": f"{about.major}.{about.minor}",
                "driver": driver,
                "cuda": built_for,
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
            ones = torch.ones(64, 64, device=f"cuda:{i}")
            works = bool((ones @ ones == 64).all())
    except Exception as error:  # of a driver, or of a torch without kernels for this GPU
        return Row(name, PROBLEM, f"cannot compute: {first_line(error)}", "nvidia-smi")
    text = (
        f"{facts['name']}, {facts['total_gib']:.1f} GiB, {facts['free_gib']:.1f} GiB free, compute capability "
        f"{facts['compute_capability']}, driver {driver or 'unknown'}, CUDA {built_for or 'none'}, "
        f"bfloat16 {'yes' if facts['bfloat16'] else 'no'}"
    )
    if not works:
        return Row(name, PROBLEM, f"{text}; it computes 64 x 64 ones wrongly", "nvidia-smi -q", facts)
    if not facts["bfloat16"]:
        return Row(name, WARNING, f"{text}; train in float32", "dppo train hardware.dtype=float32", facts)
    return Row(name, OK, text, facts=facts)


def kernels() -> Iterator[Row]:
    """Whether the kernels in Triton compute here what plain operations do. No row where they are not for the device."""
    import torch

    from dppo_cli.kernels.probe import refused, without_triton

    if not torch.cuda.is_available():
        return
    device, dtype = torch.device("cuda"), torch.bfloat16
    why = without_triton(device, dtype)
    if why == "":
        return
    if why is not None:
        text = f"{why}: norms, gates, rotations, 4-bit products and attention take several kernels each"
        yield Row("kernels", WARNING, text, "pip install triton")
        return
    from dppo_cli.kernels.fused import adapter_up, attention, comparison, nf4_product

    parts = (
        ("norms, gates and rotations", comparison.difference_in_all_families, comparison.CLOSE),
        ("4-bit products", nf4_product.difference, nf4_product.CLOSE),
        ("attention of decoding steps", attention.difference, attention.CLOSE),
        ("the adapter of several layers", adapter_up.difference, adapter_up.CLOSE),
    )
    for name, difference, close in parts:
        why = refused(partial(difference, device, dtype), close)
        if why is not None:
            yield Row("kernels", WARNING, f"{name}: those in Triton do not work here: {why}", "pip install -U triton")
            return
    yield Row("kernels", OK, "those in Triton compute what plain operations do")


def mps() -> Iterator[Row]:
    import torch

    found = torch.backends.mps.is_available()
    text = "there is one; dppo does not use it and trains on the CPU" if found else "none"
    yield Row("mps", OK, text, facts={"available": found})


def resolved(hardware: Hardware) -> Iterator[Row]:
    """What the hardware option comes to here."""
    from dppo_cli.kernels.products import emulates_bfloat16
    from dppo_cli.policy.loading import resolve_device

    try:
        device, dtype = resolve_device(hardware)
    except ConfigError as error:
        yield Row("hardware", PROBLEM, str(error), "dppo train hardware=auto")
        return
    precision = str(dtype).removeprefix("torch.")
    facts = {"device": device.type, "dtype": precision}
    text = f"device={hardware.device} dtype={hardware.dtype}: on {device.type}, in {precision}"
    if emulates_bfloat16(device, dtype):
        text += ", which this processor emulates, some 300 times slower"
        yield Row("hardware", WARNING, text, "dppo train hardware.dtype=float32", facts)
    else:
        yield Row("hardware", OK, text, facts=facts)


def embedded_model(hardware: Hardware) -> Iterator[Row]:
    """Load the model of the package and ask it something; on the CPU where `hardware` is not there."""
    import torch

    from dppo_cli.policy.forward import hidden_states
    from dppo_cli.policy.loading import load_policy, resolve_device

    try:
        resolve_device(hardware)
    except ConfigError:
        hardware = replace(hardware, device="cpu", dtype="float32")
    policy = load_policy(Model("embedded:arithmetic_1m", None, None), hardware, warn=lambda text: None)
    ids = torch.tensor([policy.tokenizer(QUESTION)["input_ids"]], device=policy.device)
    with torch.no_grad():
        log_pi_V = policy.head.log_probs(hidden_states(policy, ids)[0, -1:])[0]
    best = int(log_pi_V.argmax())
    said, value = policy.decode([best]), float(log_pi_V[best])
    text = f"embedded:arithmetic_1m on {policy.device.type}: log p({said!r} | {QUESTION!r}) = {value:.3f}"
    if said == ANSWER and math.isfinite(value):
        yield Row("embedded model", OK, text, facts={"log_prob": value})
    else:
        yield Row("embedded model", PROBLEM, f"{text}; {ANSWER!r} is right: this machine computes something else")


def start_nf4(device: str) -> "subprocess.Popen[str] | None":
    """Quantise in a process of its own, because a native library can crash or hang; None without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        return None
    # -P: no module of the working folder is imported in place of a library.
    command = [sys.executable, "-P", "-c", NF4, device]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def quantises(process: "subprocess.Popen[str] | None") -> Iterator[Row]:
    """Whether what `start_nf4` started came back with the right numbers."""
    if process is None:
        yield Row("nf4", WARNING, "not tried without bitsandbytes; adapter=qlora needs it", "pip install bitsandbytes")
        return
    fix = "pip install --force-reinstall --no-deps bitsandbytes"
    try:
        out, err = process.communicate(timeout=NF4_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        yield Row("nf4", WARNING, f"no answer in {NF4_SECONDS:g} seconds; adapter=qlora will hang", fix)
        return
    found = re.search(r"^(cuda|cpu) (\S+)$", out, flags=re.MULTILINE)
    if process.returncode != 0 or found is None:
        named = re.findall(r"^[\w.]+(?:Error|Exception)\b.*$", err, flags=re.MULTILINE)
        why = named[-1] if named else f"it ended with status {process.returncode}"
        yield Row("nf4", WARNING, f"bitsandbytes cannot quantise here, so adapter=qlora fails: {why}", fix)
        return
    device, error = found[1], float(found[2])
    facts = {"device": device, "mean_error": error if math.isfinite(error) else None}
    if error < NF4_ERROR:
        text = f"bitsandbytes quantises to NF4 on {device} and back; mean error {error:.3f}"
        yield Row("nf4", OK, text, facts=facts)
    else:
        yield Row("nf4", WARNING, f"NF4 on {device} has a mean error of {error:.3f}, not 0.073", fix, facts)


def _cpu_model() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_quota() -> float | None:
    """Cores that a container may use at a time; None for all."""
    match = re.fullmatch(r"(\d+) (\d+)", _read(CGROUP / "cpu.max"))
    return int(match[1]) / int(match[2]) if match else None


def _driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _read(path: Path) -> str:
    """A file of the system; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
