"""What `dppo doctor` says of Python, of the packages that dppo needs, and of its extras."""

import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dppo_cli import __version__
from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row, first_line

MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "accelerate": "accelerate",
    "hydra-core": "hydra",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface-hub": "huggingface_hub",
    "jinja2": "jinja2",
    "omegaconf": "omegaconf",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "rich": "rich",
    "datasets": "datasets",
    "math-verify": "math_verify",
    "httpx2": "httpx2",
    "regex": "regex",
}
"""Packages, and what they are imported as."""


def python() -> Iterator[Row]:
    version = platform.python_version()
    wanted = ">=3.11" if _dppo() is None else str(metadata.metadata("dppo")["Requires-Python"])
    facts = {"version": version, "executable": sys.executable}
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Row("python", OK, f"{version}, {sys.executable}", facts=facts)
    else:
        yield Row("python", PROBLEM, f"{version}; dppo needs {wanted}", "python3.12 -m venv .venv", facts)
    yield Row("dppo", OK, f"{__version__}, {Path(__file__).parents[1]}", facts={"version": __version__})


def packages() -> Iterator[Row]:
    """A row for each package that dppo needs. Imports it, because many that are installed cannot be."""
    asked = {r.name.lower(): r for r in _dppo() or [] if _belongs(r, "")}
    broken_torch = None
    for name, module in MODULES.items():
        wanted = asked.get(name, Requirement(name)).specifier
        install = f"pip install '{name}{wanted}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "bitsandbytes":  # LoRA runs without.
                yield Row(name, WARNING, "not installed; adapter=qlora needs it", install)
            else:
                yield Row(name, PROBLEM, "not installed", install)
            continue
        facts = {"version": version}
        try:
            build = _build(import_module(module))
        except Exception as error:  # whatever a broken installation raises
            why = first_line(error)
            if why == broken_torch:
                yield Row(name, PROBLEM, f"{version} cannot be imported without torch", facts=facts)
            else:
                yield Row(name, PROBLEM, f"{version} cannot be imported: {why}", f"{install} --force-reinstall", facts)
            broken_torch = why if name == "torch" else broken_torch
            continue
        if wanted.contains(version, prereleases=True):
            yield Row(name, OK, version + build, facts=facts)
        else:
            yield Row(name, WARNING, f"{version}{build}; dppo is made for {wanted}", install, facts)


def extras() -> Iterator[Row]:
    """A row for each extra. One that is not installed at all is no fault."""
    requirements = _dppo()
    if requirements is None:
        yield Row("extras", WARNING, "not known: dppo runs from a folder and is not installed", "pip install -e .")
        return
    for extra in sorted(metadata.metadata("dppo").get_all("Provides-Extra") or []):
        found = {
            r: _version(r.name) for r in requirements if _belongs(r, extra) and not _belongs(r, "") and r.name != "dppo"
        }
        missing = [r.name for r, version in found.items() if version is None]
        wrong = [f"{r.name} {v}" for r, v in found.items() if v and not r.specifier.contains(v, prereleases=True)]
        name, fix = f"extra {extra}", f"pip install 'dppo[{extra}]'"
        facts = {"missing": missing, "unsuitable": wrong}
        if wrong:
            yield Row(name, WARNING, f"another version is needed of {', '.join(wrong)}", fix, facts)
        elif not missing:
            yield Row(name, OK, ", ".join(f"{r.name} {version}" for r, version in found.items()), facts=facts)
        elif len(missing) < len(found):
            yield Row(name, WARNING, f"incomplete: {', '.join(missing)} missing", fix, facts)
        else:
            yield Row(name, OK, f"not installed, and not needed to train: {', '.join(missing)}", fix, facts)


def _dppo() -> list[Requirement] | None:
    """What dppo asks for; None where it is not installed but runs from a folder."""
    try:
        return [Requirement(text) for text in metadata.requires("dppo") or []]
    except metadata.PackageNotFoundError:
        return None


def _belongs(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _build(module: Any) -> str:
    """What torch was built for; nothing for all other packages."""
    if module.__name__ != "torch":
        return ""
    cuda, hip = getattr(module.version, "cuda", None), getattr(module.version, "hip", None)
    return f", built for CUDA {cuda}" if cuda else f", built for ROCm {hip}" if hip else ", a CPU build"
