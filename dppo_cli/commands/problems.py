"""The problems of a run: those to train on, and each set to evaluate on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.sections import Prompting
from dppo_cli.data.examples import content
from dppo_cli.environment.environment import Environment
from dppo_cli.errors import ConfigError, DataError, ModelError
from dppo_cli.policy.encoder import Encoder
from dppo_cli.training.evaluation import HELD_OUT
from dppo_cli.types import Example, Prompt


def read_problems(
    config: TrainConfig, warn: Callable[[str], None]
) -> tuple[list[Example], Mapping[str, Sequence[Example]]]:
    """Those to train on, and the sets to evaluate on, by name. None of these is among the former.

    Raises DataError if they cannot be read, or if there are none.
    """
    task = config.data.load(warn)
    sets = {HELD_OUT: task.heldout, **{name: source.load(warn).heldout for name, source in config.eval_sets.items()}}
    taken = {content(example) for name in config.eval_sets for example in sets[name]}
    train = [example for example in task.train if content(example) not in taken]
    if len(train) < len(task.train):
        warn(f"{len(task.train) - len(train)} training problems are in eval_sets, too, and are left out of training")
    if not train:
        raise DataError("data has no problems to train on")
    for name in config.eval_sets:
        if not sets[name]:
            raise DataError(f"eval_sets.{name} has no problems to evaluate on")
    return train, sets


def prompting_with(environment: Environment | None, prompting: Prompting, encoder: Encoder) -> Prompting:
    """`prompting` with the environment's tools, which the chat template shows to the model.

    Raises ConfigError or ModelError for a template that cannot show them.
    """
    if environment is None or not environment.schemas:
        return prompting
    if prompting.template == "plain":
        raise ConfigError(
            "environment=tools describes tools by the model's chat template; add prompt.template=chat, or answer plain "
            "prompts by environment=function"
        )
    if encoder.tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {encoder.path} has no chat template, by which tools are described; use a model that was "
            "made for them, or environment=function"
        )
    shown = replace(prompting, template_kwargs={**prompting.template_kwargs, "tools": list(environment.schemas)})
    if not encoder.shows_tools(shown):
        raise ModelError(
            f"the chat template of {encoder.path} has no place for tools; use a model that was made for them, or "
            "environment=function, and describe them in prompt.system"
        )
    return shown


def encoded_problems(
    config: TrainConfig, prompting: Prompting, encoder: Encoder, warn: Callable[[str], None]
) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """The same as the model gets them. Raises DataError or ConfigError if they do not fit the model, too."""

    def encoded(examples: Sequence[Example]) -> list[Prompt]:
        prompts = encoder.encode(examples, prompting)
        return encoder.fitting(prompts, config.sampling.max_new_tokens, config.prompt.too_long, warn)

    train, sets = read_problems(config, warn)
    return encoded(train), {name: encoded(examples) for name, examples in sets.items()}
