"""A wheel holds all that the command needs, and works where the checkout is not."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import read_json

ROOT = Path(__file__).parent.parent


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    (path,) = out.glob("dppo-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own; everything else comes from the environment that runs the tests."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([*pip, "--target", str(target), str(wheel)], target)
    # A folder that some other package has left in site-packages.
    (target / "conf").mkdir()
    (target / "conf/train.yaml").write_text("not: ours\n")
    return target


def test_the_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        names = set(file.namelist())
        sizes = {info.filename: info.file_size for info in file.infolist()}
    for tree in ("conf", "recipes"):
        expected = {f"dppo_cli/{p.relative_to(ROOT)}" for p in (ROOT / tree).rglob("*.yaml")}
        assert expected <= names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "dppo_cli").rglob("*.py")}
    assert sources <= names and "dppo_cli/embedded/pretrain.py" in sources
    embedded = "dppo_cli/embedded/arithmetic_1m"
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert f"{embedded}/{name}" in names
    assert sum(size for name, size in sizes.items() if name.startswith(embedded)) <= 2 * 2**20
    assert all(name.startswith(("dppo_cli/", "dppo-")) for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".bin", ".pt")) or "/runs/" in name]


def test_the_installed_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """`dppo --help`, and two steps of training, with conf/, recipes/ and the model from inside the package."""
    command = str(installed / "bin/dppo")
    path = {"PYTHONPATH": str(installed)}
    shown = run([command, "--help"], tmp_path, **path)
    assert "approx       binary, full, topk" in shown

    code = "import dppo_cli.config.conf_tree as c; print(c.__file__, c.config_dir(), c.recipes_dir(), sep='\\n')"
    paths = [Path(line) for line in run([sys.executable, "-c", code], tmp_path, **path).splitlines()]
    assert paths == [installed / "dppo_cli" / name for name in ("config/conf_tree.py", "conf", "recipes")]

    words = ["train", "steps=2", "batch.prompts_per_step=2", "batch.prompts_per_update=2", "data.eval_problems=4"]
    run([command, *words, "data.train_problems=50", "run_dir=run"], tmp_path, **path, OMP_NUM_THREADS="1")
    assert read_json(tmp_path / "run/summary.json")["steps"] == 2
    base = read_json(tmp_path / "run/adapter/adapter_config.json")["base_model_name_or_path"]
    assert Path(base) == installed / "dppo_cli/embedded/arithmetic_1m"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_virtual_environment(wheel: Path, tmp_path: Path) -> None:
    """Nothing but the wheel and what it asks for, in the pinned versions; started where no checkout is."""
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", str(environment)], tmp_path)
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)], tmp_path)
    run([str(environment / "bin/dppo"), "train", "steps=2", "data.eval_problems=20", "run_dir=run"], tmp_path)
    assert read_json(tmp_path / "run/summary.json")["steps"] == 2
    code = "import dppo_cli; print(dppo_cli.__file__)"
    imported = run([str(environment / "bin/python"), "-c", code], tmp_path).strip()
    assert Path(imported).is_relative_to(environment)
