"""The command line, `dppo <command> [overrides]`. Imports no torch, so help and typing errors answer at once.

Hydra composes the config; this module finds the command, prints help, and turns a user's error into one line.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dppo_cli import __version__
from dppo_cli.conf_tree import config_dir, groups, recipes_dir
from dppo_cli.errors import ConfigError, DppoError
from dppo_cli.mistakes import check_words, explain, guess

COMMANDS = {
    "train": "train a LoRA or QLoRA adapter with DPPO, evaluated before and after",
    "eval": "measure a finished run or a plain model on held-out problems",
    "export": "take the adapter, or the merged model, somewhere else",
}
EXAMPLES = """\
  dppo train
  dppo train model=llama3_8b adapter=qlora divergence=tv approx=topk hardware=gpu_24gb
  dppo train -m divergence=tv,kl approx=binary,topk seed=1,2,3"""
OPTIONS = ("-m", "--multirun", "--cfg", "--resolve", "--info", "--config-dir", "-h", "--help", "--version")
TAKE_A_VALUE = ("--cfg", "--info", "--config-dir")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status: 0, 1 (numerical failure), 2 (the user's mistake), 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--version" in args:
        print(f"dppo {__version__}")
        return 0
    if not args or {"-h", "--help"} & set(args):
        print(help_text())
        return 0
    try:
        command = args[0]
        if command not in COMMANDS:
            raise ConfigError(f"there is no command {command!r}{guess(command, COMMANDS)}")
        options, overrides = split_options(args[1:])
        if "--config-dir" not in options:
            check_words(command, overrides)
        _run_hydra(command, options, [recipe_override(word) for word in overrides])
        return 0
    except DppoError as error:
        print(f"dppo: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("dppo: interrupted", file=sys.stderr)
        return INTERRUPTED


def help_text() -> str:
    width = max(map(len, groups()))
    lines = [f"dppo {__version__}: RL fine-tuning of language models with Divergence Proximal Policy Optimization", ""]
    lines += ["usage: dppo <command> [-m] [group=choice] [key=value] ...", "", "commands:"]
    lines += [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    lines += ["", "groups and their choices:"]
    lines += [f"  {name:<{width}}  {', '.join(choices)}" for name, choices in groups().items()]
    lines += ["", "options:", "  -m           run every combination of comma-separated values, with a table at the end"]
    lines += ["  --cfg job    show the composed config and stop; every key is explained in conf/", "  --version", ""]
    lines += ["examples:", EXAMPLES]
    return "\n".join(lines)


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and overrides, wherever they stood: Hydra's parser wants them apart.

    Raises ConfigError for a word with dashes that is no option: `--steps 5`, as other programs want it.
    """
    options: list[str] = []
    overrides: list[str] = []
    for word in words:
        name = word.partition("=")[0]
        if name in OPTIONS or (options[-1:] and options[-1] in TAKE_A_VALUE and "=" not in word):
            options.append(word)
        elif name and not name.startswith("-"):
            overrides.append(word)
        else:
            raise ConfigError(f"there is no option {word!r}; options: {', '.join(OPTIONS)}; keys are set as key=value")
    if "--cfg" in options and not {"job", "hydra", "all"} & set(options):
        raise ConfigError("--cfg shows a config: --cfg job, --cfg hydra or --cfg all")
    return options, overrides


def recipe_override(word: str) -> str:
    """`recipe=NAME` as Hydra finds it: the group option recipes/NAME/recipe.yaml."""
    key, _, name = word.partition("=")
    if key != "recipe":
        return word
    known = sorted(p.parent.name for p in recipes_dir().glob("*/recipe.yaml"))
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}{guess(name, known)}")
    return f"+recipes/{name}=recipe"


def _run_hydra(command: str, options: list[str], overrides: list[str]) -> None:
    # Hydra then raises what went wrong instead of printing a trace of its own and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Threads that spin for long make a run many times slower when another program wants the cores, too; those that do
    # not spin at all cost a quarter of the speed when none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps machine code for every number of rows it meets, by default of 1,024 products: 0.2 GiB in ten steps.
    # Those of one token or one micro-batch, which repeat from layer to layer, are a few dozen.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from dppo_cli.run_folder import default_run_dir, remove_if_empty

    # The user's own modules (`_target_: my_module.MyDivergence`) are looked for where dppo was started.
    sys.path.insert(0, os.getcwd())
    sweep_dirs: list[str] = []

    def sweep_dir(run_dir: str | None) -> str:
        if not sweep_dirs:
            sweep_dirs.append(run_dir or str(default_run_dir("sweeps")))
        return sweep_dirs[0]

    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    failures: list[DppoError] = []
    composed = False

    def task(node: DictConfig) -> Any:
        nonlocal composed
        composed = True
        try:
            return _run_task(command, node)
        except DppoError as error:
            # Kept for the end: Hydra would print a line of its own, and break off a sweep.
            failures.append(error)
            return error

    started_with = sys.argv
    searchpath = f"hydra.searchpath=[file://{recipes_dir().parent}]"
    sys.argv = ["dppo", *options, "--", *overrides, searchpath]
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:
            raise
        raise ConfigError(explain(error, command, overrides)) from error
    finally:
        sys.argv = started_with
        for folder in sweep_dirs:
            remove_if_empty(Path(folder))
    if failures:
        raise failures[0]


def _run_task(command: str, node: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    from dppo_cli import config as schemas

    if command == "train" and HydraConfig.get().mode is RunMode.MULTIRUN:
        node.run_dir = HydraConfig.get().runtime.output_dir
    with open_dict(node):
        # Where Hydra leaves the recipe's choices.
        node.pop("recipes", None)
    _make_absolute(node)
    schema = {"train": schemas.TrainConfig, "eval": schemas.EvalConfig, "export": schemas.ExportConfig}[command]
    built: Any = schemas.build(schema, node)
    module = importlib.import_module({"eval": "dppo_cli.evaluate"}.get(command, f"dppo_cli.{command}"))
    return getattr(module, f"run_{command}")(built, OmegaConf.to_yaml(node, resolve=True))


def _make_absolute(node: Any) -> None:
    """A run folder is read from anywhere, so the files that its config names are kept by their whole path."""
    from omegaconf import OmegaConf

    for key in ("model.path", "data.path", "data.eval_path", "reward.path"):
        value = OmegaConf.select(node, key)
        if not isinstance(value, str):
            continue
        file, colon, function = value.rpartition(":") if key == "reward.path" else (value, "", "")
        if file and Path(file).exists():
            OmegaConf.update(node, key, f"{Path(file).resolve()}{colon}{function}")


if __name__ == "__main__":
    sys.exit(main())
