"""`dppo sample`: what the base and the trained policy write to a prompt, or in a conversation, as it is sampled."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import GenerationConfig

from dppo_cli.commands.beside import Beside
from dppo_cli.commands.plain import base_config
from dppo_cli.commands.problems import prompting_with
from dppo_cli.commands.schemas import SampleConfig
from dppo_cli.commands.streamed import Heard, Streamed, spoken
from dppo_cli.commands.trained import find_trained
from dppo_cli.config.sections import Prompting
from dppo_cli.errors import ConfigError, DataError, ModelError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import RolloutEngine, derive_seed, in_order
from dppo_cli.rollout.turns import TurnsEngine
from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.table import print_to_stderr
from dppo_cli.types import Completion, Example, Messages, Prompt, Status

LONGEST_LINE = 2**20
OF_THE_RUN = ("environment", "hardware")
"""Sections that are the run's, apart from the keys that the user sets."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: what `node` leaves open is the run's, or that of a plain model.

    Raises ConfigError unless there is one thing to sample from, RunError if the run cannot be used.
    """
    base = base_config(node, "sample", OF_THE_RUN)
    with open_dict(node):
        for name in (*OF_THE_RUN, "model", "adapter"):
            node[name] = base[name]
        if node.prompt.template is None:
            node.prompt = OmegaConf.merge(base.prompt, {k: v for k, v in node.prompt.items() if v is not None})
        elif node.prompt.template_kwargs is None:
            node.prompt.template_kwargs = {}
        for name, value in node.sampling.items():
            if value is None:
                node.sampling[name] = base.sampling[name]
    return node


def run_sample(config: SampleConfig, config_yaml: str) -> dict[str, Any]:
    """Answer each prompt; returns what JSON holds of each."""
    run = None if config.run is None else find_trained(config.run, print_to_stderr)
    with phase("loading the model"):
        policy = load_policy(
            config.model,
            config.hardware,
            warn=print_to_stderr,
            adapter=config.adapter,
            saved_adapter=run.adapter if run else None,
        )
    policy.model.eval()
    # A model's own (a repetition penalty, a top_k) would fill in what is not said, and sample another distribution.
    policy.model.generation_config = GenerationConfig()
    environment = config.environment.load(print_to_stderr)
    prompting = prompting_with(environment, config.prompt, policy.encoder)
    columns: dict[str, Callable[[], Any]] = {"model": nullcontext}
    if run:
        columns = {"base": policy.without_adapter, "trained": nullcontext}
    said: dict[str, list[dict[str, str]]] = {name: [] for name in columns}
    turns: list[dict[str, Any]] = []
    for text in _lines() if config.text is None else [config.text]:
        _check_unicode(text)
        prompts = {name: _encode(policy, prompting, said[name], text) for name in columns}
        longest = max(len(prompt.token_ids) for prompt in prompts.values())
        _check_length(policy, longest, config.sampling.max_new_tokens)
        seed = derive_seed(config.seed, len(turns))
        samples: dict[str, list[Completion]] = {name: [] for name in columns}
        with Beside(list(columns), config.samples, silent=config.json) as view:
            for name, switched in columns.items():
                for i in range(config.samples):
                    view.begin(name, i)
                    engine: RolloutEngine = Streamed(policy, view.add)
                    if environment is not None:
                        engine = TurnsEngine(engine, Heard(environment, view.add), policy, prompting)
                    with switched():
                        generated = engine.generate([prompts[name]], 1, config.sampling, 0, derive_seed(seed, i))
                        samples[name] += in_order(generated)[0]
                    view.end("".join(map(spoken, samples[name][-1].said)))
        if config.prompt.template == "chat":
            for name in columns:
                said[name] += [_message("user", text), *map(dict, samples[name][0].said)]
        turn = {
            "run": config.run,
            "model": config.model.path,
            "sampling": asdict(config.sampling),
            "seed": config.seed,
            "prompt": text,
            "samples": {name: list(map(_described, found)) for name, found in samples.items()},
        }
        if config.json:
            print(json.dumps(turn, allow_nan=False), flush=True)
        turns.append(turn)
    if not turns and not _is_terminal():
        raise ConfigError('there is no prompt: write text="...", or lines to stdin')
    return {"turns": turns}


def _described(found: Completion) -> dict[str, Any]:
    return {
        "text": found.text,
        "messages": list(map(dict, found.messages)),
        "tokens": len(found.token_ids_T),
        "finished": found.status is Status.FINISHED,
    }


def _encode(policy: Policy, prompting: Prompting, said: Messages, text: str) -> Prompt:
    """The prompt, or the conversation with it as its last message.

    Raises ModelError if there is no chat template or it refuses the conversation, DataError if there is no token.
    """
    if not said:
        try:
            return policy.encode([Example(text, "")], prompting)[0]
        except DataError as error:
            raise DataError(str(error).replace("problem 0", "the prompt", 1)) from None
    system = [] if prompting.system is None else [_message("system", prompting.system)]
    chat = [*system, *map(dict, said), _message("user", text)]
    try:
        rendered: Any = policy.tokenizer.apply_chat_template(
            chat,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            **prompting.template_kwargs,
        )
    except Exception as error:  # A template is a program.
        why = " ".join(str(error).split())
        raise ModelError(f"the chat template of {policy.path} refuses the conversation: {why}") from None
    return Prompt(0, Example(text, ""), tuple(rendered["input_ids"]), chat)


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _check_length(policy: Policy, tokens: int, max_new_tokens: int) -> None:
    limit = policy.positions
    if limit is not None and tokens + max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {tokens} tokens; with sampling.max_new_tokens={max_new_tokens} that is more than the "
            f"{limit} positions of {policy.path}; lower it, or shorten the prompt"
        )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {text[:60]!a} is not UTF-8 text") from None


def _lines() -> Iterator[str]:
    """Prompts from the terminal or a pipe, until an empty line or the end."""
    while sys.stdin is not None:
        if _is_terminal():
            # Not on stdout, which has samples alone.
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline(LONGEST_LINE + 1)
        except UnicodeDecodeError:
            raise DataError("what stdin holds is not UTF-8 text") from None
        if len(line) > LONGEST_LINE:
            raise DataError(f"a line of stdin has more than {LONGEST_LINE:,} characters; a prompt is one line")
        if not line.strip():
            return
        yield line.removesuffix("\n").removesuffix("\r")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
