"""What `dppo doctor` says of devices, memory and 4-bit weights, where they are odd or broken."""

import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkups import AUTO, Change, only

from dppo_cli.cli.main import main
from dppo_cli.commands.checkup import machine
from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row

# Devices


@pytest.fixture
def no_gpu(monkeypatch: Change) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_no_gpu(monkeypatch: Change) -> None:
    """That is no fault, unless a driver says that there is one."""
    monkeypatch.setattr(machine, "_driver", lambda: None)
    assert only(machine.gpus()) == Row("gpu", OK, "none; training runs on the CPU", facts={"count": 0})
    monkeypatch.setattr(machine, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    row = only(machine.gpus())
    assert row.text == "the driver 570.1 is installed, but this torch is a CPU build"
    assert (row.status, row.fix) == (WARNING, "pip install --force-reinstall torch==2.13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    row = only(machine.gpus())
    assert row.text == "torch, built for CUDA 12.8, sees none, although the driver 570.1 is installed"
    assert (row.status, row.fix) == (WARNING, "nvidia-smi")


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_is_asked_for_and_there_is_none() -> None:
    """The model is then tried on the CPU, so that there is one problem and not two."""
    hardware = replace(AUTO, device="cuda")
    row = only(machine.resolved(hardware))
    assert (row.status, row.fix) == (PROBLEM, "dppo train hardware=auto")
    assert row.text.startswith("hardware.device=cuda, but torch sees no GPU here")
    assert only(machine.embedded_model(hardware)).status == OK


def gpu(monkeypatch: Change, *, bfloat16: bool = True, ones: Callable[..., Any] = torch.ones) -> list[Row]:
    """The rows of two GPUs that are made up; products run on the CPU."""
    about = SimpleNamespace(name="H100 [x]", total_memory=80 * 2**30, major=9, minor=0)
    cpu_ones = lambda *shape, device: ones(*shape)  # noqa: E731
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "device": lambda i: nullcontext(),
        "get_device_properties": lambda i: about,
        "mem_get_info": lambda i: (70 * 2**30, 80 * 2**30),
        "is_bf16_supported": lambda including_emulation: bfloat16,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "_driver", lambda: "570.1")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", cpu_ones)
        return list(machine.gpus())


def test_gpus(monkeypatch: Change) -> None:
    first, second = gpu(monkeypatch)
    assert (first.part, second.part, first.status) == ("gpu 0", "gpu 1", OK)
    assert first.text == (
        "H100 [x], 80.0 GiB, 70.0 GiB free, compute capability 9.0, driver 570.1, CUDA 12.8, bfloat16 yes"
    )
    assert first.facts["compute_capability"] == "9.0" and first.facts["free_gib"] == 70
    old, _ = gpu(monkeypatch, bfloat16=False)
    assert (old.status, old.fix) == (WARNING, "dppo train hardware.dtype=float32")
    assert old.text.endswith("bfloat16 no; train in float32")


def test_gpus_that_do_not_work(monkeypatch: Change) -> None:
    def refuses(*shape: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image\nCompile with")

    row, _ = gpu(monkeypatch, ones=refuses)
    assert (row.status, row.text) == (PROBLEM, "cannot compute: CUDA error: no kernel image")
    row, _ = gpu(monkeypatch, ones=lambda *shape: torch.full(shape, 1.5))
    assert row.status == PROBLEM and row.text.endswith("it computes 64 x 64 ones wrongly")


@pytest.mark.parametrize(
    ("without", "refuses", "status", "text"),
    [
        ("Triton is not installed", None, WARNING, "Triton is not installed: norms"),
        (None, "its results are 0.7 off", WARNING, "norms, gates and rotations: those in Triton do not work here: its"),
        (None, None, OK, "those in Triton compute"),
    ],
)
def test_kernels(without: str | None, refuses: str | None, status: str, text: str, monkeypatch: Change) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dppo_cli.kernels.probe.without_triton", lambda device, dtype: without)
    monkeypatch.setattr("dppo_cli.kernels.probe.refused", lambda difference, close: refuses)
    row = only(machine.kernels())
    assert row.status == status and row.text.startswith(text)
    assert bool(row.fix) is (status == WARNING)


def test_no_kernels_for_a_cpu(monkeypatch: Change) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(machine.kernels()) == []


def test_the_driver_is_that_of_nvidia_smi(tmp_path: Path, monkeypatch: Change) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._driver() is None
    for script, expected in (("echo 570.1; echo 570.1", "570.1"), ("exit 9", None), ("exec /bin/sleep 60", None)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setattr(machine, "SMI_SECONDS", 0.5 if "sleep" in script else 10)
        assert machine._driver() == expected


def test_bfloat16_that_a_processor_emulates(monkeypatch: Change) -> None:
    monkeypatch.setattr("dppo_cli.kernels.products.has_onednn", lambda device, dtype: dtype == torch.float32)
    row = only(machine.resolved(replace(AUTO, device="cpu", dtype="bfloat16")))
    assert (row.status, row.fix) == (WARNING, "dppo train hardware.dtype=float32")
    assert row.text.startswith("device=cpu dtype=bfloat16: on cpu, in bfloat16, which this processor emulates")
    row = only(machine.processor())
    assert "bfloat16 no, oneDNN yes" in row.text and row.facts["bfloat16"] is False


def test_a_processor_that_is_not_used(tmp_path: Path, monkeypatch: Change) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    row = only(machine.processor())
    assert row.status == OK and "; torch uses 4 of 8 cores; AVX-512 " in row.text
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    row = only(machine.processor())
    assert (row.status, row.fix) == (WARNING, "unset OMP_NUM_THREADS")
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    row = only(machine.processor())
    assert (row.status, row.fix, row.facts["quota"]) == (WARNING, "export OMP_NUM_THREADS=2", 2.5)
    assert "this container may use 2.5" in row.text
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert only(machine.processor()).facts["quota"] is None


def test_memory(tmp_path: Path, monkeypatch: Change) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    found = SimpleNamespace(total=16 * 2**30, available=8 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: found)
    facts = {"total_gib": 16.0, "free_gib": 8.0, "limit_gib": None}
    assert only(machine.memory()) == Row("memory", OK, "16.0 GiB, 8.0 GiB free", facts=facts)
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    row = only(machine.memory())
    assert (row.status, row.facts["limit_gib"]) == (WARNING, 0.5)
    assert "this container may use 0.5 GiB: hardly enough" in row.text
    (tmp_path / "memory.max").write_text("max\n")
    found.available = 2**29
    assert only(machine.memory()).status == WARNING


def test_mps(monkeypatch: Change) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert only(machine.mps()).text == "there is one; dppo does not use it and trains on the CPU"


def test_a_machine_that_computes_something_else(monkeypatch: Change) -> None:
    real = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda self, *a: real(-self, *a))
    row = only(machine.embedded_model(replace(AUTO, device="cpu")))
    assert row.status == PROBLEM and row.text.endswith("'4' is right: this machine computes something else")


# 4-bit weights


def nf4(monkeypatch: Change, code: str, seconds: float = 60.0) -> Row:
    monkeypatch.setattr(machine, "NF4", code)
    monkeypatch.setattr(machine, "NF4_SECONDS", seconds)
    return only(machine.quantises(machine.start_nf4("cpu")))


def test_no_bitsandbytes(monkeypatch: Change) -> None:
    monkeypatch.setitem(machine.sys.modules, "bitsandbytes", None)
    row = only(machine.quantises(machine.start_nf4("auto")))
    assert (row.status, row.fix) == (WARNING, "pip install bitsandbytes")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import numpy.nothing", "fails: ModuleNotFoundError: No module named 'numpy.nothing'"),
        ("import os; os.kill(os.getpid(), 4)", "fails: it ended with status -4"),
        ("print('something else')", "fails: it ended with status 0"),
        ("print('noise'); print('cpu 0.9')", "NF4 on cpu has a mean error of 0.900, not 0.073"),
        ("print('cpu nan')", "NF4 on cpu has a mean error of nan, not 0.073"),
    ],
)
def test_a_bitsandbytes_that_does_not_work(code: str, says: str, monkeypatch: Change) -> None:
    row = nf4(monkeypatch, code)
    assert row.status == WARNING and row.text.endswith(says) and row.fix
    assert row.facts.get("mean_error") in (None, 0.9)


def test_a_bitsandbytes_that_hangs_is_killed(monkeypatch: Change) -> None:
    started = time.monotonic()
    row = nf4(monkeypatch, "import time; time.sleep(60)", seconds=0.5)
    assert (row.status, row.text) == (WARNING, "no answer in 0.5 seconds; adapter=qlora will hang")
    assert time.monotonic() - started < 20


def test_no_module_of_the_working_folder_is_imported(work: Path, monkeypatch: Change) -> None:
    (work / "torch.py").write_text("open('marker', 'w')\n")
    process = machine.start_nf4("cpu")
    assert isinstance(process, subprocess.Popen)
    assert only(machine.quantises(process)).status == OK
    assert not (work / "marker").exists()


def test_doctor_on_hardware_that_is_not_there(work: Path, monkeypatch: Change, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("packages", "extras", "quantises"):
        monkeypatch.setattr(f"dppo_cli.commands.doctor.{name}", lambda *_: iter(()))
    monkeypatch.setattr("dppo_cli.commands.doctor.start_nf4", lambda device: None)
    assert main(["doctor", "hardware=gpu_24gb"]) == 2
    assert capsys.readouterr().err == "dppo: training fails here until this is mended: hardware\n"
