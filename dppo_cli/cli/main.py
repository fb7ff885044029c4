"""The command line, `dppo <command> [overrides]`. Imports no torch, so help and typing errors answer at once.

Hydra composes the config; this module finds the command, prints help, and turns a user's error into one line.
"""

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dppo_cli import __version__
from dppo_cli.cli.launcher import check_launcher, speaker
from dppo_cli.cli.mistakes import FREE, check_words, explain, member
from dppo_cli.cli.sweep import RECORD, exit_status, failures, read_records, remove_if_empty, show
from dppo_cli.cli.table import COMMANDS
from dppo_cli.config.checks import check_no_secrets, did_you_mean, escaped, visible
from dppo_cli.config.conf_tree import config_dir, groups, recipes_dir
from dppo_cli.errors import ConfigError, DppoError, RunError, Stopped

EXAMPLES = """\
  dppo train
  dppo train model=llama3_8b adapter=qlora divergence=tv approx=topk hardware=gpu_24gb
  dppo train -m divergence=tv,kl approx=binary,topk seed=1,2,3"""
OPTIONS = ("-m", "--multirun", "--cfg", "--resolve", "--info", "--config-dir", "-h", "--help", "--version")
TAKE_A_VALUE: dict[str, tuple[str, ...] | None] = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--config-dir": None,
}
INTERRUPTED = 130
LONGEST_LINE = 2000
"""Characters of an error: a value in it may be a file that was typed by mistake."""
OPTUNA = "hydra/sweeper=optuna"
SEARCH = ("hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1")
"""What Optuna is told unless the user says otherwise: a job's value is an accuracy, and a failed job ends no search."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status: 0, 1 (numerical failure), 2 (the user's mistake), 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    _ignore_until_there_is_a_run()
    _forget_relative_folders()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A terminal that cannot show a character is no reason to stop.
    if "--version" in args:
        print(f"dppo {__version__}")
        return 0
    if not args or {"-h", "--help"} & set(args):
        print(help_text())
        return 0
    try:
        command = args[0]
        if command not in COMMANDS:
            raise ConfigError(f"there is no command {command!r}{did_you_mean(command, COMMANDS)}")
        options, overrides = split_options(args[1:])
        if command == "compare":
            overrides = [word for given in overrides for word in both_runs(given)]
        if "--config-dir" not in options:
            check_words(command, overrides)
        check_launcher(command, sweeps=bool({"-m", "--multirun"} & set(options)))
        return _run_hydra(command, options, [as_hydra_has_it(command, word) for word in overrides])
    except DppoError as error:
        _say(str(error))
        return error.exit_status
    except OSError as error:
        _say(f"{error.filename}: {error.strerror or error}")
        return RunError.exit_status
    except Stopped as error:
        _say(f"stopped: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    finally:
        _flush()


def _forget_relative_folders() -> None:
    """The XDG specification says to ignore them; a library that does not would write into the working directory."""
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        if not os.path.isabs(os.environ.get(name, "/")):
            del os.environ[name]


def _say(text: str) -> None:
    """A line, whatever a value or a name in it holds, and however long that is."""
    line = visible(f"{speaker()}{text}")
    print(f"dppo: {line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + '...'}", file=sys.stderr)


def _ignore_until_there_is_a_run() -> None:
    """SIGUSR1, which asks a run for a checkpoint, would kill a process that is still loading."""
    if not hasattr(signal, "SIGUSR1") or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        # A handler, not SIG_IGN, which the processes of a reward would inherit.
        signal.signal(signal.SIGUSR1, lambda *_: None)


def help_text() -> str:
    width = max(map(len, groups()))
    lines = [f"dppo {__version__}: RL fine-tuning of language models with Divergence Proximal Policy Optimization", ""]
    lines += ["usage: dppo <command> [-m] [group=choice] [key=value] ...", "", "commands:"]
    lines += [f"  {name:<8} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "groups and their choices:"]
    lines += [f"  {name:<{width}}  {', '.join(choices)}" for name, choices in groups().items()]
    lines += ["", "options:", "  -m           run every combination of comma-separated values, with a table at the end"]
    lines += ["  --cfg job    show the composed config and stop; every key is explained in conf/", "  --version", ""]
    lines += ["examples:", EXAMPLES]
    return "\n".join(lines)


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and overrides, in whatever order they were typed: Hydra's parser takes them apart.

    Raises ConfigError for a word with dashes that is not an option, such as `--steps 5`.
    """
    options: list[str] = []
    overrides: list[str] = []
    for word in words:
        name, has_value, value = word.partition("=")
        if options[-1:] and options[-1] in TAKE_A_VALUE:
            options.append(word)
        elif name in OPTIONS:
            options += [name, value] if has_value else [name]
        elif name and not name.startswith("-"):
            overrides.append(word)
        else:
            raise ConfigError(f"there is no option {word!r}; options: {', '.join(OPTIONS)}; keys are set as key=value")
    for name, value in zip(options, [*options, ""][1:], strict=True):
        known = TAKE_A_VALUE.get(name, (value,))
        if known is not None and value not in known:
            raise ConfigError(f"{name} {value} is an invalid value. Choices: {', '.join(known)}")
        if known is None and not os.path.isdir(value):
            raise ConfigError(f"{name} {value}: there is no such folder")
    return options, overrides


def both_runs(word: str) -> list[str]:
    """`runs=[A,B]` as `run=A other=B`: Hydra would take a folder `runs` for a group of choices."""
    match = re.fullmatch(r"runs=\[([^,\[\]]+),([^,\[\]]+)\]", word)
    return [word] if match is None else [f"run={match[1].strip()}", f"other={match[2].strip()}"]


def as_hydra_has_it(command: str, word: str) -> str:
    """`recipe=NAME` as the group option recipes/NAME/recipe.yaml; keys that need not be in YAML as new ones.

    These are keys of a section that is the run's, and those below FREE. Text that is taken as it is typed is quoted. A
    member of a mapping is the choice of its group, at its place.
    """
    key, _, name = word.partition("=")
    if key in COMMANDS[command].verbatim:
        # What would be an interpolation is text, too.
        return f"{key}={_quoted(escaped(name))}"
    if (group := member(key, name)) is not None:
        return f"+{group}@{key}={name}"
    of_the_run = key.partition(".")[0] in COMMANDS[command].of_the_run and "." in key
    if of_the_run or key.startswith(FREE):
        return f"++{word}"
    if key != "recipe":
        return word
    known = sorted(p.parent.name for p in recipes_dir().glob("*/recipe.yaml"))
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}{did_you_mean(name, known)}")
    return f"+recipes/{name}=recipe"


def _run_hydra(command: str, options: list[str], overrides: list[str]) -> int:
    """Compose and run; the exit status of a sweep."""
    # Hydra then raises what went wrong instead of printing a trace of its own and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Threads that spin for long make a run many times slower when another program wants the cores, too; those that do
    # not spin at all cost a quarter of the speed when none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps machine code for every number of rows it meets, by default of 1,024 products: 0.2 GiB in ten steps.
    # Those of one token or one micro-batch, which repeat from layer to layer, are a few dozen.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # Torch keeps what describes them in a cache of its own, 1,024 of 0.15 MiB; what it finds in oneDNN's costs no time.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    import hydra
    from hydra.errors import HydraException

    from dppo_cli.cli.hydra_job import HydraJob
    from dppo_cli.cli.hydra_keys import check_hydra
    from dppo_cli.cli.stop import Launching, StopsJobs
    from dppo_cli.training.run_folder import check_free

    check_no_secrets(" ".join(overrides))
    sweep_dir = _sweep_dir(overrides)
    stops = StopsJobs(sweep_dir)
    job = HydraJob(command, stops.file)
    shows_only = {"--cfg", "--info"} & {option.partition("=")[0] for option in options}
    goes_on = any(word.startswith("resume=") and word != "resume=null" for word in overrides)
    if sweep_dir.exists() and not shows_only and not goes_on:
        check_free(sweep_dir, "run_dir")
    if goes_on and {"-m", "--multirun"} & set(options):
        if (sweep_dir / "config.yaml").is_file():
            raise ConfigError(f"run_dir={sweep_dir} holds a run; a sweep (-m) needs a folder of its own")
        for record in sweep_dir.glob(f"*/{RECORD}"):
            record.unlink()
    searchpath = f"file://{recipes_dir().parent}"
    own = [f"hydra.searchpath=[{searchpath}]", f"hydra.sweep.dir={_quoted(str(sweep_dir))}", Launching.WORD]
    started_with = sys.argv
    if OPTUNA in overrides:
        overrides = [OPTUNA, *SEARCH, *overrides]
    sys.argv = ["dppo", *options, "--", *overrides, *own]
    try:
        config_dirs = [
            f"file://{os.path.abspath(options[i + 1])}" for i, o in enumerate(options) if o == "--config-dir"
        ]
        if config_dirs or any(re.match(r"[+~]*(hydra|[^=]*@)", word) for word in overrides):
            check_hydra(command, overrides, [*config_dirs, searchpath])  # in the order in which Hydra looks
        with stops:
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(job)()
    except DppoError:
        raise
    except (Stopped, KeyboardInterrupt) as error:
        if not read_records(sweep_dir):  # It is no sweep.
            raise
        stops.signum = getattr(error, "signum", signal.SIGINT)
    except Exception as error:  # Of odd words Hydra raises errors of many kinds.
        # A search of which every job failed ends in an error of the sweeper's; the records say why.
        if not exit_status(read_records(sweep_dir)):
            if job.composed or (isinstance(error, OSError) and not isinstance(error, HydraException)):
                raise
            raise ConfigError(explain(error, command, overrides)) from error
    finally:
        sys.argv = started_with
        records = read_records(sweep_dir)
        if records:
            show(records, overrides)
            remove_if_empty(sweep_dir)
    if stops.signum is not None:
        # What was saved of each job is in the table.
        go_on = f"to go on: the same command with run_dir={sweep_dir} resume=auto"
        raise Stopped(stops.signum, go_on if command == "train" else "jobs that had ended are done")
    if job.failure is not None:
        try:
            raise job.failure
        finally:
            job.failure = None  # Its trace holds this frame, and everything that the command has loaded.
    status = exit_status(records)
    if status:
        _say(failures(records))
    return status


def _sweep_dir(overrides: Sequence[str]) -> Path:
    """The folder of a sweep's jobs, should this be one: `run_dir`, or sweeps/<date>_<time>."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from dppo_cli.training.run_folder import default_run_dir

    for word in reversed(overrides):  # The last of a key counts.
        if word.startswith("run_dir="):
            try:
                override = OverridesParser.create().parse_override(word)
            except (HydraException, ValueError):  # ValueError: more digits than Python reads
                continue  # Hydra will say what is wrong with it.
            if override.is_sweep_override():
                raise ConfigError(f"{word}: run_dir is the folder of all jobs of a sweep; name one")
            return default_run_dir("sweeps") if override.value() is None else Path(str(override.value()))
    return default_run_dir("sweeps")


def _flush() -> None:
    """Write out what was printed; what reads it (`| head`) may be gone, which is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quoted(text: str) -> str:
    """As a value on Hydra's command line."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


if __name__ == "__main__":
    sys.exit(main())
