"""The commands, a row each. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`dppo <name>` composes conf/<name>.yaml, builds `schema` from it and calls `run_<name>` of `module`."""

    help: str
    module: str  # in dppo_cli.commands
    schema: str  # in dppo_cli.commands.schemas
    job_key: str | None  # the key that takes a job's own folder under -m
    prepare: str  # in dppo_cli.commands: the module whose prepare() gives the config to build
    of_the_run: tuple[str, ...] = ()  # groups that are the run's; of each, the user may set a key alone
    verbatim: tuple[str, ...] = ()  # keys whose value is text, taken as it is typed


COMMANDS = {
    "train": Command(
        "train a LoRA or QLoRA adapter with DPPO, evaluated before and after",
        "train",
        "TrainConfig",
        "run_dir",
        "resume",
    ),
    "eval": Command(
        "measure a finished run or a plain model on held-out problems",
        "evaluate",
        "EvalConfig",
        "out",
        "evaluate",
        ("data", "reward", "environment", "rollout", "hardware"),
    ),
    "export": Command(
        "take the adapter, or the merged model, somewhere else",
        "export",
        "ExportConfig",
        None,
        "export",
        ("data", "reward", "environment", "hardware"),
    ),
    "sample": Command(
        "show what the model writes to a prompt, before and after training",
        "sample",
        "SampleConfig",
        None,
        "sample",
        ("environment", "hardware"),
        ("text",),
    ),
    "plan": Command(
        "say what a run needs, in memory and time, before it starts",
        "plan",
        "PlanConfig",
        None,
        "plan",
    ),
    "data": Command(
        "show the problems of a run as the model and the reward see them",
        "data",
        "DataConfig",
        None,
        "resume",
    ),
    "doctor": Command(
        "say what is installed and whether it works here",
        "doctor",
        "DoctorConfig",
        None,
        "doctor",
    ),
    "report": Command(
        "a run or a sweep as one HTML file: curves, samples, tokens",
        "report",
        "ReportConfig",
        None,
        "report",
    ),
    "compare": Command(
        "two runs on the same problems: what is the difference?",
        "compare",
        "CompareConfig",
        "out",
        "compare",
        ("data", "reward", "environment", "rollout", "hardware"),
    ),
    "runs": Command(
        "list runs: state, step, accuracy, age and size",
        "runs",
        "RunsConfig",
        None,
        "runs",
    ),
}
