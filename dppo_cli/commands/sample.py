"""`dppo sample`: what the base and the trained policy write to a prompt, or in a conversation, as it is sampled."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import GenerationConfig, TextStreamer

from dppo_cli.commands.beside import Beside
from dppo_cli.commands.plain import base_config
from dppo_cli.commands.schemas import SampleConfig
from dppo_cli.commands.trained import find_trained
from dppo_cli.config.sections import Prompting, Sampling
from dppo_cli.errors import ConfigError, DataError, ModelError, NumericalError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import derive_seed
from dppo_cli.rollout.stop_strings import before_first
from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.table import print_to_stderr
from dppo_cli.types import Example

LONGEST_LINE = 2**20
Messages = list[dict[str, str]]


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: what `node` leaves open is the run's, or that of a plain model.

    Raises ConfigError unless there is one thing to sample from, RunError if the run cannot be used.
    """
    base = base_config(node, "sample", ["hardware"])
    with open_dict(node):
        for name in ("hardware", "model", "adapter"):
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
    columns: dict[str, Callable[[], Any]] = {"model": nullcontext}
    if run:
        columns = {"base": policy.without_adapter, "trained": nullcontext}
    said: dict[str, Messages] = {name: [] for name in columns}
    turns: list[dict[str, Any]] = []
    for text in _lines() if config.text is None else [config.text]:
        _check_unicode(text)
        prompts = {name: _encode(policy, config.prompt, said[name], text) for name in columns}
        _check_length(policy, max(map(len, prompts.values())), config.sampling.max_new_tokens)
        seed = derive_seed(config.seed, len(turns))
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in columns}
        with Beside(list(columns), config.samples, silent=config.json) as view:
            for name, switched in columns.items():
                for i in range(config.samples):
                    view.begin(name, i)
                    torch.manual_seed(derive_seed(seed, i))
                    with switched():
                        samples[name].append(_sample(policy, prompts[name], config.sampling, view.add))
                    view.end(samples[name][-1]["text"])
        if config.prompt.template == "chat":
            for name in columns:
                said[name] += [_message("user", text), _message("assistant", samples[name][0]["text"])]
        turn = {
            "run": config.run,
            "model": config.model.path,
            "sampling": asdict(config.sampling),
            "seed": config.seed,
            "prompt": text,
            "samples": samples,
        }
        if config.json:
            print(json.dumps(turn, allow_nan=False), flush=True)
        turns.append(turn)
    if not turns and not _is_terminal():
        raise ConfigError('there is no prompt: write text="...", or lines to stdin')
    return {"turns": turns}


def _sample(policy: Policy, ids: list[int], sampling: Sampling, show: Callable[[str], None]) -> dict[str, Any]:
    """One response, shown as it grows. Raises NumericalError if the policy's logits are NaN."""
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    if sampling.stop:
        options["stop_strings"] = sampling.stop
    prompt_1L = torch.tensor([ids], device=policy.device)
    model: Any = policy.model
    with torch.no_grad(), policy.autocast():
        out_1T = model.generate(
            prompt_1L,
            GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(policy.eos_ids),
                pad_token_id=policy.pad_id,
                **options,
            ),
            attention_mask=torch.ones_like(prompt_1L),
            logits_processor=[_refuse_nan],
            streamer=_Stream(policy, show),
            tokenizer=policy.tokenizer,
        )
    tokens: list[int] = out_1T[0, len(ids) :].tolist()
    whole = policy.decode(tokens)
    text = before_first(whole, sampling.stop)
    finished = tokens[-1] in policy.eos_ids or text != whole
    return {"text": text, "tokens": len(tokens), "finished": finished}


class _Stream(TextStreamer):
    """Hands on what transformers has decoded, as soon as later tokens cannot change it."""

    def __init__(self, policy: Policy, show: Callable[[str], None]) -> None:
        super().__init__(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def _refuse_nan(ids_1T: torch.Tensor, logits_1V: torch.Tensor) -> torch.Tensor:
    if logits_1V.isnan().any():
        raise NumericalError("the logits of the policy are NaN: its weights are broken")
    return logits_1V


def _encode(policy: Policy, prompting: Prompting, said: Messages, text: str) -> list[int]:
    """The prompt, or the conversation with it as its last message, as token ids.

    Raises ModelError if there is no chat template or it refuses the conversation, DataError if there is no token.
    """
    if not said:
        try:
            return list(policy.encode([Example(text, "")], prompting)[0].token_ids)
        except DataError as error:
            raise DataError(str(error).replace("problem 0", "the prompt", 1)) from None
    system = [] if prompting.system is None else [_message("system", prompting.system)]
    try:
        rendered: Any = policy.tokenizer.apply_chat_template(
            [*system, *said, _message("user", text)],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            **prompting.template_kwargs,
        )
    except Exception as error:  # A template is a program.
        why = " ".join(str(error).split())
        raise ModelError(f"the chat template of {policy.path} refuses the conversation: {why}") from None
    return list(rendered["input_ids"])


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
