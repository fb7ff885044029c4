"""`dppo doctor` where everything works, and where parts are broken."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from checkups import AUTO, Change, only
from packaging.requirements import Requirement

from dppo_cli import __version__
from dppo_cli.cli.main import main
from dppo_cli.commands import doctor
from dppo_cli.commands.checkup import software
from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_import(tmp_path: Path, monkeypatch: Change) -> Callable[[str, str], None]:
    """`fake_import(name, source)`: what other processes import under this name."""

    def write(name: str, source: str) -> None:
        folder = tmp_path / "fake" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return write


# The command


def test_a_machine_that_works(work: Path, monkeypatch: Change, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON is all that stdout holds, and the table says the same."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor", "hardware=cpu", "json=true"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    rows = {row["part"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) and {row["status"] for row in report["rows"]} <= {OK, WARNING}
    assert report["status"] in (OK, WARNING) and "hf_secret" not in captured.out + captured.err
    assert rows["dppo"]["facts"] == {"version": __version__}
    for name in (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "hydra-core",
        "tokenizers",
        "safetensors",
    ):
        assert rows[name]["facts"] == {"version": metadata.version(name)}
    assert rows["torch"]["text"].endswith(
        f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    )
    assert rows["hub token"]["facts"] == {"present": True}
    assert rows["hardware"]["facts"] == {"device": "cpu", "dtype": "float32"}
    # The model of the package, and the error of NF4 that its levels give for normal numbers.
    assert rows["embedded model"]["facts"]["log_prob"] == pytest.approx(-0.5814, abs=1e-4)
    assert rows["nf4"]["facts"]["mean_error"] == pytest.approx(0.0729, abs=2e-3)
    assert rows["memory"]["facts"]["total_gib"] == psutil.virtual_memory().total / 2**30
    assert rows["processor"]["facts"]["threads"] == torch.get_num_threads()
    assert {"extra sweeps", "extra dev", "mps", "disk", "signatures", "hub"} <= set(rows)


def test_the_table_and_the_exit_status(monkeypatch: Change, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("one", OK, "fine"), Row("[b]two", WARNING, "slow [red]", "do [x]"), Row("three", PROBLEM, "gone")]
    monkeypatch.setattr(doctor, "examine", lambda hardware: rows)
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.out.splitlines() if "│" in line]
    assert lines == [
        ["ok", "one", "fine"],
        ["warning", "[b]two", "slow [red]"],
        ["", "", "do [x]"],
        ["problem", "three", "gone"],
    ]
    assert captured.err == "dppo: training fails here until this is mended: three\n"
    assert main(["doctor", "json=true"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == PROBLEM
    assert json.loads(captured.out)["rows"][1] == {
        "part": "[b]two",
        "status": WARNING,
        "text": "slow [red]",
        "fix": "do [x]",
        "facts": {},
    }
    monkeypatch.setattr(doctor, "examine", lambda hardware: rows[:2])
    assert main(["doctor", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == WARNING


def test_a_check_that_breaks_is_a_row(monkeypatch: Change, work: Path) -> None:
    def broken(*_: object) -> Any:
        raise OSError("libcuda.so is missing\n  and more")

    quick = {name: lambda *_: iter(()) for name in ("packages", "extras", "embedded_model", "gpus", "quantises")}
    for name, check in {**quick, "processor": broken, "reaches_hub": broken}.items():
        monkeypatch.setattr(doctor, name, check)
    monkeypatch.setattr(doctor, "start_nf4", lambda device: None)
    rows = {row.part: row for row in doctor.examine(AUTO)}
    assert rows["processor"] == Row("processor", PROBLEM, "cannot be looked at: libcuda.so is missing")
    assert rows["hub"].status == PROBLEM and rows["memory"].status in (OK, WARNING)


def test_it_loads_where_torch_does_not(fake_import: Callable[[str, str], None]) -> None:
    fake_import("torch", "raise ImportError('libtorch_cpu.so: cannot open\\nmore')")
    code = (
        "from dppo_cli.commands.doctor import DoctorConfig, run_doctor\n"
        "from dppo_cli.config.sections import Hardware\n"
        "run_doctor(DoctorConfig(Hardware('auto', 'auto', 2048, 256, False, 1), True), '')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    rows = {row["part"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["torch"]["text"].endswith("cannot be imported: libtorch_cpu.so: cannot open")
    assert rows["torch"]["fix"].startswith("pip install 'torch") and rows["torch"]["status"] == PROBLEM
    assert rows["peft"]["text"].endswith("cannot be imported without torch")
    assert rows["embedded model"]["text"] == "cannot be looked at: libtorch_cpu.so: cannot open"
    assert rows["nf4"]["text"].endswith("adapter=qlora fails: ImportError: libtorch_cpu.so: cannot open")
    assert (rows["hydra-core"]["status"], rows["disk"]["status"]) == (OK, OK)
    assert "training fails here until this is mended: torch, peft" in done.stderr


# Software


def test_every_package_that_dppo_needs_is_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(text).name for text in project["dependencies"]}
    assert needed <= set(software.MODULES)
    assert [row.part for row in software.packages()] == list(software.MODULES)


def packages(monkeypatch: Change, name: str, version: str | Exception, error: Exception | None = None) -> Row:
    """The row of a package of this version (or without one), whose import may fail."""
    real_version, real_import = metadata.version, software.import_module

    def find(asked: str) -> str:
        if asked == name and isinstance(version, Exception):
            raise version
        return str(version) if asked == name else real_version(asked)

    def load(module: str) -> Any:
        if module == software.MODULES[name] and error is not None:
            raise error
        return real_import(module)

    monkeypatch.setattr(software.metadata, "version", find)
    monkeypatch.setattr(software, "import_module", load)
    return {row.part: row for row in software.packages()}[name]


def test_packages_that_are_missing_broken_or_of_another_version(monkeypatch: Change) -> None:
    wanted = next(r for r in map(Requirement, metadata.requires("dppo") or []) if r.name == "peft").specifier
    missing = metadata.PackageNotFoundError("peft")
    install = f"pip install 'peft{wanted}'"
    with monkeypatch.context() as patch:
        assert packages(patch, "peft", missing) == Row("peft", PROBLEM, "not installed", install)
    with monkeypatch.context() as patch:
        row = packages(patch, "peft", "0.21.9", OSError("bad\nELF"))
        assert (row.status, row.text) == (PROBLEM, "0.21.9 cannot be imported: bad")
        assert row.fix == f"{install} --force-reinstall"
    with monkeypatch.context() as patch:
        row = packages(patch, "peft", "0.1")
        assert row == Row("peft", WARNING, f"0.1; dppo is made for {wanted}", install, {"version": "0.1"})
    with monkeypatch.context() as patch:
        row = packages(patch, "bitsandbytes", metadata.PackageNotFoundError("bitsandbytes"))
        assert (row.status, row.text) == (WARNING, "not installed; adapter=qlora needs it")


def of_dppo(monkeypatch: Change, installed: dict[str, str], extra: str = "tools") -> Row:
    """The row of an extra of two packages, of which these are installed."""

    def find(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    requires = [f"{name}>=2; extra == 'tools'" for name in ("hammer", "saw")] + ["dppo[tools]; extra == 'tools'", "x"]
    about = SimpleNamespace(get_all=lambda name: [extra])
    for name, value in (("version", find), ("requires", lambda _: requires), ("metadata", lambda _: about)):
        monkeypatch.setattr(software.metadata, name, value)
    return only(software.extras())


def test_extras(monkeypatch: Change) -> None:
    fix = "pip install 'dppo[tools]'"
    whole = of_dppo(monkeypatch, {"hammer": "2.1", "saw": "3"})
    assert (whole.part, whole.status, whole.text, whole.fix) == ("extra tools", OK, "hammer 2.1, saw 3", None)
    part = of_dppo(monkeypatch, {"hammer": "2.1"})
    assert (part.status, part.text, part.fix) == (WARNING, "incomplete: saw missing", fix)
    assert part.facts == {"missing": ["saw"], "unsuitable": []}
    none = of_dppo(monkeypatch, {})
    assert (none.status, none.text) == (OK, "not installed, and not needed to train: hammer, saw")
    assert none.fix == fix
    old = of_dppo(monkeypatch, {"hammer": "1.9", "saw": "3"})
    assert (old.status, old.text, old.fix) == (WARNING, "another version is needed of hammer 1.9", fix)


def test_dppo_that_is_not_installed_and_a_python_that_is_too_new(monkeypatch: Change) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    wanted = metadata.metadata("dppo")["Requires-Python"]
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.10.1")
    row, _ = software.python()
    assert (row.status, row.text) == (PROBLEM, f"3.10.1; dppo needs {wanted}")
    monkeypatch.setattr(software.metadata, "requires", absent)
    assert only(software.extras()).fix == "pip install -e ."
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.12.4")
    assert [row.status for row in software.python()] == [OK, OK]
