"""The command line, `dppo <command> [overrides]`. Imports no torch, so help and typing errors answer at once.

Hydra composes the config; this module finds the command, prints help, and turns a user's error into one line.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dppo_cli import __version__
from dppo_cli.errors import ConfigError, DppoError

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
PACKAGE = Path(__file__).parent


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
            raise ConfigError(f"there is no command {command!r}{_guess(command, COMMANDS)}")
        options, overrides = split_options(args[1:])
        _run_hydra(command, options, [recipe_override(word) for word in overrides])
        return 0
    except DppoError as error:
        print(f"dppo: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("dppo: interrupted", file=sys.stderr)
        return INTERRUPTED


def config_dir() -> Path:
    """The YAML tree: beside the package in a checkout, inside it in an installed wheel."""
    return _data_dir("conf", "train.yaml")


def recipes_dir() -> Path:
    """The recipes, likewise."""
    return _data_dir("recipes", "README.md")


def groups() -> dict[str, list[str]]:
    """Config groups with their choices."""
    found = sorted(p for p in config_dir().iterdir() if p.is_dir())
    return {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in found}


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
        raise ConfigError(f"there is no recipe {name!r}{_guess(name, known)}")
    return f"+recipes/{name}=recipe"


def _run_hydra(command: str, options: list[str], overrides: list[str]) -> None:
    # Hydra then raises what went wrong instead of printing a trace of its own and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Threads that spin for long make a run many times slower when another program wants the cores, too; those that do
    # not spin at all cost a quarter of the speed when none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
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


def explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """Hydra's complaint in one line, with the nearest right word."""
    from hydra.errors import OverrideParseException

    message = str(error)
    first = message.strip().splitlines()[0].rstrip(".")
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; write key=value, with quotes around spaces, commas and brackets"
    if match := re.search(r"Could not override '([^']+)'", message):
        return _no_such_key(match.group(1), _composed(error, command))
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        return _no_such_choice(*match.groups())
    if "override must be a string" in message:
        words = [word.split("=", 1) for word in overrides if word.partition("=")[0] in groups()]
        for group, choice in words:
            if choice not in groups()[group]:
                return _no_such_choice(group, choice)
    if "ambiguous value" in message.lower():
        return f"{first.split(': ', 1)[-1]}; to run every value, add -m"
    return first


def _composed(error: Exception, command: str) -> Any:
    """The config in which Hydra did not find a key."""
    # What it had composed by then hangs on the error that its own comes from; to compose again would take as long.
    if error.__cause__ is not None:
        return error.__cause__.parent_node._get_root()  # type: ignore[attr-defined]
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(command)


def _no_such_choice(group: str, choice: str) -> str:
    return f"there is no {group}={choice}{_guess(choice, groups().get(group, []))}"


def _no_such_key(key: str, composed: Any) -> str:
    """`composed`: the config that the key was to be set in."""
    keys = _dotted_keys(composed)
    if key in keys:
        below = [k for k in keys if k.startswith(f"{key}.")]
        return f"{key} cannot be set as a whole here; set {', '.join(below or [key])}"
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    parent = key.rpartition(".")[0]
    siblings = sorted({k.removeprefix(f"{parent}.").split(".")[0] for k in keys if k.startswith(f"{parent}.")})
    if not siblings:
        parent, siblings = "", sorted({k.split(".")[0] for k in keys})
    guess = f"; did you mean {close[0]}?" if close else "."
    return f"there is no key {key}{guess} Choices{f' in {parent}' if parent else ''}: {', '.join(siblings)}"


def _dotted_keys(config: Any) -> list[str]:
    """Every key of a config, inner ones too, without Hydra's own."""
    from omegaconf import OmegaConf

    keys: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if prefix:
            keys.append(prefix)
        if isinstance(value, dict):
            for name, child in value.items():
                walk(f"{prefix}.{name}" if prefix else name, child)

    walk("", OmegaConf.to_container(config, resolve=False))
    return [k for k in keys if not k.endswith("._target_") and k.split(".")[0] not in ("hydra", "recipes")]


def _guess(word: str, choices: Any) -> str:
    from dppo_cli.sections import did_you_mean

    return did_you_mean(word, choices)


def _data_dir(name: str, marker: str) -> Path:
    # Inside first: beside an installed package stand other people's folders.
    for place in (PACKAGE / name, PACKAGE.parent / name):
        if (place / marker).is_file():
            return place
    raise ConfigError(f"the folder {name} is missing from this installation of dppo; install it again")


if __name__ == "__main__":
    sys.exit(main())
