"""A Modelfile, with which Ollama takes a GGUF file: https://docs.ollama.com/modelfile."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from dppo_cli.config.sections import Prompting, Sampling
from dppo_cli.policy.policy import Policy

SYSTEM, USER, REPLY, AGAIN = "(system text)", "(first question)", "(first answer)", "(second question)"
"""Texts that stand for messages in a chat template's output."""


def modelfile(file: str, policy: Policy, prompt: Prompting, sampling: Sampling) -> str:
    """Its text: the file, the prompt's form where it can be said, ends of responses, and how the run's policy samples.

    It holds no system message of the run, as the model card does not.
    """
    template: str | None = "{{ .Prompt }}"
    if prompt.template == "chat":
        template = chat_template(policy.tokenizer, prompt.template_kwargs)
    ends = [str(policy.tokenizer.convert_ids_to_tokens(i)) for i in policy.eos_ids]
    parameters = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": 1.0,
        "num_predict": sampling.max_new_tokens,
    }
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if prompt.system is not None:
        lines.append('# The run had a system message, which this file does not hold; add SYSTEM """...""".')
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys([*ends, *sampling.stop])]
    return "\n".join(lines) + "\n"


def chat_template(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str | None:
    """The chat template as Ollama's Go template; None where conversations are more than texts between messages.

    It is read off the output for conversations with known texts in them.
    """
    try:
        one, two = _rendered(tokenizer, options, USER), _rendered(tokenizer, options, USER, REPLY, AGAIN)
        before, after = one.split(USER)
        between = two.split(REPLY)[1].split(AGAIN)[0]
    except Exception:  # A template is a program.
        return None
    # The end of what comes before the first question also comes before each later one.
    ask = next(before[i:] for i in range(len(before) + 1) if between.endswith(before[i:]))
    # An end of sequence closes the message before it.
    ask = ask.rpartition(str(tokenizer.eos_token))[2]
    first, end = before[: len(before) - len(ask)], between[: len(between) - len(ask)]
    if two != f"{before}{USER}{after}{REPLY}{end}{ask}{AGAIN}{after}" or not (ask or end):
        return None
    system = ""
    try:
        opened, rest = _rendered(tokenizer, options, USER, system=SYSTEM).split(SYSTEM)
    except Exception:  # There are templates that refuse a system message.
        pass
    else:
        if not rest.endswith(f"{ask}{USER}{after}"):
            return None
        closed = rest[: len(rest) - len(f"{ask}{USER}{after}")]
        system = f'{{{{ if eq .Role "system" }}}}{opened}{{{{ .Content }}}}{closed}{{{{ end }}}}'
    beginning = f"{{{{ if not .System }}}}{first}{{{{ end }}}}" if system and first else first
    turns = (
        f'{{{{ if eq .Role "user" }}}}{ask}{{{{ .Content }}}}{after}{{{{ end }}}}'
        f'{{{{ if eq .Role "assistant" }}}}{{{{ .Content }}}}{end}{{{{ end }}}}'
    )
    if any(sign in text for text in (one, two) for sign in ("{{", '"""')):
        return None
    return f"{beginning}{{{{ range .Messages }}}}{system}{turns}{{{{ end }}}}"


def _rendered(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], *turns: str, system: str | None = None
) -> str:
    """A conversation that ends where the model answers, without the token that tokenisation puts first."""
    roles = ("user", "assistant")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if begins else text


def _quoted(text: str) -> str:
    return f'"{text}"' if '"' not in text and "\n" not in text else f'"""{text}"""'
