"""What of Hydra's own config may be set, in words and in YAML files of --config-dir: nothing that names code."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dppo_cli.cli.hydra_keys import check_hydra
from dppo_cli.cli.main import main
from dppo_cli.config.conf_tree import recipes_dir

THEIRS = """\
from pathlib import Path

Path(__file__).with_name("marker").touch()


class Callback:
    def __init__(self, *args, **options):
        pass

    def on_run_start(self, **options):
        pass

    on_run_end = on_job_start = on_job_end = on_multirun_start = on_multirun_end = on_run_start


def space(config, trial):
    pass
"""
CALLBACK = "hydra:\n  callbacks:\n    mine:\n      _target_: theirs.Callback\n"
GLOBAL = "# @package _global_\n"
TV = "_target_: dppo_cli.algorithm.divergence.TotalVariation\ndelta_low: 0.1\ndelta_high: 0.1\n"
USUAL = f"file://{recipes_dir().parent}"
STEPS = "steps=0 must be at least 1"
"""What a command line says that has come as far as it should."""

Refused = Callable[..., str]
Own = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def theirs(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves `marker` beside itself when it is imported, where Hydra would find it."""
    (work / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(work))
    yield work / "marker"
    sys.modules.pop("theirs", None)


@pytest.fixture
def blocked(refused: Refused, theirs: Path) -> Refused:
    """`refused`, and nothing was imported."""

    def run(*words: str) -> str:
        line = refused("train", *words, "steps=0")
        assert not theirs.exists()
        return line

    return run


@pytest.fixture
def own() -> Own:
    """Writes a YAML file into the user's --config-dir, the folder `own`."""

    def write(name: str, text: str) -> None:
        path = Path("own") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


# Words


@pytest.mark.parametrize(
    "word",
    [
        "hydra.callbacks.x._target_=theirs.Callback",
        "+hydra.callbacks.x._target_=theirs.Callback",
        "++hydra.callbacks={x:{_target_:theirs.Callback}}",
        "+hydra/callbacks=x",
        "hydra/job_logging=colorlog",
        "~hydra/job_logging",
        "+hydra.job_logging.handlers.x={(): theirs.Callback}",
        "hydra/hydra_logging=default",
        "hydra.run.dir=elsewhere",
        "hydra.sweep.dir=elsewhere",
        "hydra.searchpath=[file:///tmp]",
        "hydra.output_subdir=x",
        "hydra.job.chdir=true",
        "+hydra.job.env_set.LD_PRELOAD=x",
        "hydra.verbose=true",
        "hydra/help=default",
    ],
)
@pytest.mark.parametrize("options", [[], ["-m"]], ids=["single", "sweep"])
def test_a_word_for_another_key_of_hydras(word: str, options: list[str], blocked: Refused) -> None:
    part = word.lstrip("+~").replace("/", ".").split(".")[1].partition("=")[0]
    assert f"hydra.{part} cannot be set; of Hydra's own keys, launcher, sweeper, mode can" in blocked(*options, word)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hydra.launcher._target_=theirs.Callback", "hydra.launcher names theirs.Callback, which is not a launcher"),
        ("++hydra.launcher={_target_:theirs.Callback}", "hydra.launcher names theirs.Callback"),
        ("+hydra.launcher.a={b:[{_target_:theirs.Callback}]}", "hydra.launcher names theirs.Callback"),
        ("hydra.sweeper._target_=theirs.Callback", "hydra.sweeper names theirs.Callback"),
        ("hydra.sweeper._target_=${steps}", "hydra.sweeper names ${steps}"),
        ("++hydra={callbacks:{x:{_target_:theirs.Callback}}}", "hydra cannot be set"),
    ],
)
def test_a_word_that_names_a_class(word: str, says: str, blocked: Refused) -> None:
    for options in ([], ["-m"]):
        assert says in blocked(*options, word)


# YAML files


@pytest.mark.parametrize(
    ("name", "text", "word", "says"),
    [
        ("extra/x.yaml", GLOBAL + CALLBACK, "+extra=x", "--config-dir sets hydra.callbacks; only launcher"),
        ("divergence/x.yaml", f"{GLOBAL}divergence: {{}}\n{CALLBACK}", "divergence=x", "--config-dir sets hydra.call"),
        ("extra/x.yaml", "# @package hydra.callbacks.x\n_target_: theirs.Callback\n", "+extra=x", "hydra.callbacks"),
        ("extra/x.yaml", "_target_: theirs.Callback\n", "+extra@hydra.callbacks.x=x", "hydra.callbacks"),
        ("extra/x.yaml", f"{GLOBAL}hydra: {{run: {{dir: elsewhere}}}}\n", "+extra=x", "--config-dir sets hydra.run"),
        (
            "extra/x.yaml",
            f"{GLOBAL}hydra: {{job_logging: {{handlers: {{x: {{(): theirs.Callback}}}}}}}}\n",
            "+extra=x",
            "--config-dir sets hydra.job_logging",
        ),
        ("hydra/launcher/basic.yaml", "_target_: theirs.Callback\n", "seed=1", "hydra.launcher names theirs.Callback"),
        ("hydra/launcher/x.yaml", "_target_: theirs.Callback\n", "hydra/launcher=x", "hydra.launcher names theirs.C"),
        ("hydra/sweeper/x.yaml", "_target_: theirs.Callback\n", "hydra/sweeper=x", "hydra.sweeper names theirs.Callb"),
    ],
)
@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/basic' is validated against")
def test_a_file_of_the_users_own_that_names_code(
    name: str, text: str, word: str, says: str, own: Own, blocked: Refused
) -> None:
    own(name, text)
    assert says in blocked("--config-dir", "own", word)
    assert says in blocked("--config-dir", "own", "-m", word)


@pytest.mark.parametrize("choices", ["good,bad", "choice(good,bad)", "[good],[good,bad]"])
def test_every_choice_of_a_sweep_is_looked_at(choices: str, own: Own, blocked: Refused) -> None:
    own("extra/good.yaml", f"{GLOBAL}prompt: {{template: plain}}\n")
    own("extra/bad.yaml", GLOBAL + CALLBACK)
    assert "--config-dir sets hydra.callbacks" in blocked("-m", "--config-dir", "own", f"+extra={choices}")
    assert "with --config-dir, name the choices" in blocked("-m", "--config-dir", "own", "+extra=glob(*)")


def test_a_file_that_another_file_asks_for(own: Own, blocked: Refused) -> None:
    own("extra/x.yaml", "defaults:\n  - inner: y\n")
    own("extra/inner/y.yaml", GLOBAL + CALLBACK)
    assert "--config-dir sets hydra.callbacks" in blocked("--config-dir", "own", "+extra=x")
    own("extra/x.yaml", f"{GLOBAL}defaults:\n  - override /hydra/launcher: z\n")
    own("hydra/launcher/z.yaml", "_target_: theirs.Callback\n")
    assert "hydra.launcher names theirs.Callback" in blocked("--config-dir", "own", "+extra=x")


@pytest.mark.parametrize("name", ["hydra_settings", "batch/paper", "model/arithmetic_1m", "train"])
def test_a_file_of_a_name_of_ours_does_not_take_its_place(name: str, own: Own, blocked: Refused) -> None:
    """What is composed without a word."""
    own(f"{name}.yaml", GLOBAL + CALLBACK)
    assert STEPS in blocked("--config-dir", "own")


def test_a_recipe_of_a_name_of_ours(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own("recipes/stability/recipe.yaml", GLOBAL + CALLBACK)
    main(["train", "--config-dir", "own", "recipe=stability", "--cfg", "hydra"])
    assert "theirs.Callback" not in capsys.readouterr().out


def test_the_other_spelling_of_the_option(own: Own, blocked: Refused) -> None:
    own("extra/x.yaml", GLOBAL + CALLBACK)
    blocked("--config-dir=own", "+extra=x")


@pytest.mark.parametrize("job", ["{env_set: {LD_PRELOAD: evil.so}}", "{chdir: true}"])
def test_the_environment_of_a_job(job: str, own: Own, blocked: Refused) -> None:
    own("extra/x.yaml", f"{GLOBAL}hydra: {{job: {job}}}\n")
    assert "--config-dir sets hydra.job" in blocked("--config-dir", "own", "+extra=x")


def test_a_search_space_that_is_code(own: Own) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra dppo[sweeps]")
    own("extra/x.yaml", f"{GLOBAL}hydra: {{sweeper: {{custom_search_space: theirs.space}}}}\n")
    folder = f"file://{Path('own').absolute()}"
    with pytest.raises(Exception, match="custom_search_space"):
        check_hydra("train", ["hydra/sweeper=optuna", "+extra=x"], [USUAL, folder])


# What may be set


def test_an_ordinary_folder_of_the_users_own(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own("divergence/mine.yaml", TV)
    own("extra/x.yaml", f"{GLOBAL}sampling: {{max_new_tokens: 5}}\n")
    words = ["--config-dir", "own", "divergence=mine", "+extra=x", "--cfg", "job"]
    assert main(["train", *words]) == 0
    shown = capsys.readouterr().out
    assert "delta_low: 0.1\n" in shown and "max_new_tokens: 5\n" in shown
    check_hydra("train", ["divergence=mine,tv", "seed=1,2"], [USUAL, f"file://{Path('own').absolute()}"])


@pytest.mark.parametrize(
    "words",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
        ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=3", "seed=range(1,9)"],
        ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=maximize"],
    ],
)
def test_launchers_and_sweepers_of_the_extra(words: list[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra dppo[sweeps]")
    check_hydra("train", words, [USUAL])


def test_launchers_and_sweepers_of_hydras(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hydra/launcher=basic", "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2", "hydra.mode=RUN"]
    assert main(["train", *words, "--cfg", "hydra"]) == 0
    assert "max_batch_size: 2" in capsys.readouterr().out


def test_launchers_in_a_file_of_the_users_own(own: Own) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra dppo[sweeps]")
    own(
        "extra/x.yaml", f"{GLOBAL}defaults:\n  - override /hydra/launcher: joblib\nhydra:\n  launcher:\n    n_jobs: 2\n"
    )
    check_hydra("train", ["+extra=x"], [USUAL, f"file://{Path('own').absolute()}"])
