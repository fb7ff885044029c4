"""The model card of an adapter or a merged model: README.md, in Markdown with YAML front matter. Imports no torch.

A card is made to be published. So it shows no folder of this machine, no text under a key that names a secret, and not
the system message; and whatever the user wrote stands in code spans, where it cannot change the Markdown.
"""

import math
import re
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any

import yaml

from dppo_cli.config.saved import PLAIN

HUB_NAME = re.compile(r"\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)
"""owner/name."""
EMBEDDED = "embedded:"
FOLDERS = re.compile(r"(?<![^\s=:,;'\"(\[])(?:~[^\s/]*)?/(?:[^\s/]*/)*(?=[^\s/])")
"""The folders of an absolute path within a text, at its start or after a space, a bracket or the like."""
SECRET = re.compile(r"(?:api|access|auth|private)_?key|token$|secret|passw|credential", re.IGNORECASE)
LABELS = {"approx": "Approximation"}
DPPO = "dppo_cli.algorithm.objective.DPPO"
SEQUENCE_MEAN = "dppo_cli.algorithm.region.SequenceMean"
PAPER = "[arXiv 2602.04879](https://arxiv.org/abs/2602.04879)"


def card(config: Mapping[str, Any], results: Mapping[str, Any] | None, kind: str) -> str:
    """The text of README.md.

    `config`: what config.yaml of the run holds. `results`: what summary.json holds, or as much as is known; what is
    missing is not shown, or shown as not measured. `kind`: adapter, merged (plain transformers), or gguf.
    """
    base, revision = str(config["model"]["path"]), config["model"].get("revision")
    lora = f"{_kind(config)} adapter"
    named = f"the language model {_base(base, link=True)}"
    if revision is not None:
        named += f" (revision {_code(str(revision))})"
    if config["model"].get("gguf_file") is not None:
        named += f" (file {_code(_last(str(config['model']['gguf_file'])))})"
    if kind == "adapter":
        title, what = f"{lora} for {_base(base)}", f"A {lora} for {named}"
    else:
        title, what = f"{_base(base)} after reinforcement learning", f"A merge of {named} with a {lora}"
    blocks = [
        f"---\n{yaml.safe_dump(_metadata(base, kind), sort_keys=False)}---",
        f"# {title}",
        f"{what}, trained with reinforcement learning by the command-line tool `dppo`.",
        "## Results",
        *_results(config, results or {}),
        "## Data and reward",
        "\n".join(_task(config)),
        "## Method",
        "\n".join(_method(config)),
        "## How to load it",
        *_loading(config, kind),
    ]
    return "\n\n".join(blocks) + "\n"


def _metadata(base: str, kind: str) -> dict[str, Any]:
    """What the hub sorts models by."""
    on_hub = HUB_NAME.fullmatch(base) is not None
    tags = ["dppo", "reinforcement-learning"]
    if kind == "adapter":
        # The last two are PEFT's own.
        tags += ["lora", "transformers", *([f"base_model:adapter:{base}"] if on_hub else [])]
    if kind == "gguf":
        tags.append("gguf")
    return {
        **({"base_model": base} if on_hub else {}),
        "library_name": {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}[kind],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _kind(config: Mapping[str, Any]) -> str:
    """LoRA, QLoRA, DoRA, QDoRA or rsLoRA; the last together with another in words."""
    adapter = _section(config, "adapter")
    kind = "DoRA" if adapter.get("use_dora") else "LoRA"
    if adapter.get("quantization") is not None:
        kind = f"Q{kind}"
    if not adapter.get("use_rslora"):
        return kind
    return "rsLoRA" if kind == "LoRA" else f"rank-stabilised {kind}"


def _base(path: str, link: bool = False) -> str:
    """The base by its name on the hub, or by that of its folder."""
    if HUB_NAME.fullmatch(path):
        return f"[`{path}`](https://huggingface.co/{path})" if link else f"`{path}`"
    return _code(_last(path.removeprefix(EMBEDDED)))


def _results(config: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    problems = results.get("eval_problems")
    on = "held-out problems" if problems is None else f"{problems} held-out problems"
    cells = [_accuracy(results, when) for when in ("before", "after")]
    measure = f"Evaluation: {', '.join(_settings(_section(config, 'eval'), skip=('every',)))}."
    if any("±" in cell for cell in cells):
        measure += " ± is the standard error."
    known = {key: value for key, value in results.items() if value is not None}
    cost = []
    if "steps" in known:
        cost.append(f"{known['steps']} of {config['steps']} steps")
    if "seconds" in known:
        cost.append(f"time {timedelta(seconds=round(known['seconds']))}")
    if "peak_memory_gib" in known:
        cost.append(f"peak memory {known['peak_memory_gib']:.2f} GiB")
    table = f"| | before training | after training |\n|---|---|---|\n| accuracy on {on} | {' | '.join(cells)} |"
    return [table, measure, *([f"Training: {', '.join(cost)}."] if cost else [])]


def _accuracy(results: Mapping[str, Any], when: str) -> str:
    accuracy, error = results.get(f"eval_{when}"), results.get(f"eval_{when}_error")
    # Not a number: no sample was judged, or there was one problem only.
    if accuracy is None or math.isnan(accuracy):
        return "not measured"
    return f"{accuracy:.1%}" if error is None or math.isnan(error) else f"{accuracy:.1%} ± {error:.1%}"


def _task(config: Mapping[str, Any]) -> list[str]:
    prompt = _section(config, "prompt")
    empty = () if prompt.get("template_kwargs") else ("template_kwargs",)
    template = f"- Prompt: {', '.join(_settings(prompt, skip=('system', 'too_long', *empty)))}"
    if prompt.get("system") is not None:
        template += ", with a system message"
    return [*(_option(name, config[name]) for name in ("data", "reward") if name in config), template]


def _method(config: Mapping[str, Any]) -> list[str]:
    objective = str(_section(config, "objective").get("_target_"))
    lines = [f"- Adapter: {', '.join([_kind(config), *_settings(_section(config, 'adapter'))])}"]
    for name in config:
        node = _section(config, name)
        if "_target_" not in node or name in ("data", "reward", "rollout") or node["_target_"] in PLAIN:
            continue
        note = f" ({PAPER})" if node["_target_"] == DPPO else ""
        if name in ("divergence", "approx") and objective.startswith("dppo_cli.") and objective != DPPO:
            note = " (measured; this objective does not use it)"
        elif name == "divergence" and _section(config, "region").get("_target_") == SEQUENCE_MEAN:
            note = " (measured; this region does not use it)"
        lines.append(_option(name, node) + note)
    run = {key: config[key] for key in ("steps", "seed", "anchor", "verdict", "kl_to_reference") if key in config}
    return [
        *lines,
        f"- Optimizer: {', '.join(['AdamW', *_settings(_section(config, 'optim'), skip=('on_nonfinite',))])}",
        f"- Batch: {', '.join(_settings(_section(config, 'batch')))}",
        f"- Sampling: {', '.join(_settings(_section(config, 'sampling')))}",
        f"- Run: {', '.join(_settings(run))}",
    ]


def _loading(config: Mapping[str, Any], kind: str) -> list[str]:
    """Python that loads the model, and what its placeholders stand for."""
    path, revision = str(config["model"]["path"]), config["model"].get("revision")
    quantised = _section(config, "adapter").get("quantization") == "nf4"
    folder = "`FOLDER` is the folder of this file, or its name on the hub."
    more = " The policy was trained on a base in 4 bits; the merge uses the unquantised one." if quantised else ""
    if kind == "gguf":
        text = "llama-cli -m FOLDER/NAME.gguf\nollama create NAME -f FOLDER/Modelfile"
        return [f"```sh\n{text}\n```", f"{folder} With llama.cpp, or with Ollama.{more}"]
    if kind != "adapter":
        text = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")'
        )
        return [f"```python\n{text}\n```", folder + more]
    lines, base, options = [], '"BASE"', ""
    if path.startswith(EMBEDDED):
        lines.append("from importlib.resources import files\n")
        base = f'str(files("dppo_cli.embedded") / {_literal(_last(path.removeprefix(EMBEDDED)))})'
        folder += " The base model is part of the Python package `dppo`."
    elif HUB_NAME.fullmatch(path):
        base = f'"{path}"'
        options = "" if revision is None else f", revision={_literal(str(revision))}"
    else:
        folder += f" `BASE` is the folder of the base model, {_base(path)}."
    lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    gguf_file = config["model"].get("gguf_file")
    if gguf_file is not None:
        options += f", gguf_file={_literal(str(gguf_file))}"
        lines[-1] += ", GgufConfig"
    if quantised:
        lines[-1] += ", BitsAndBytesConfig"
    lines += ["", f"base = {base}", f"tokenizer = AutoTokenizer.from_pretrained(base{options})"]
    if quantised:
        dtype = "float32" if _section(config, "hardware").get("dtype") == "float32" else "bfloat16"
        lines += [
            "nf4 = BitsAndBytesConfig(",
            "    load_in_4bit=True,",
            '    bnb_4bit_quant_type="nf4",',
            "    bnb_4bit_use_double_quant=True,",
            f'    bnb_4bit_compute_dtype="{dtype}",',
            ")",
        ]
        options += ", quantization_config=nf4"
    elif gguf_file is not None:
        options += ", quantization_config=GgufConfig(dequantize=True)"
    lines += [
        f"model = AutoModelForCausalLM.from_pretrained(base{options})",
        'model = PeftModel.from_pretrained(model, "FOLDER")',
    ]
    return ["```python\n" + "\n".join(lines) + "\n```", folder]


def _option(name: str, node: Mapping[str, Any]) -> str:
    """A line about a group's choice."""
    words = _words(node)
    if not re.fullmatch(r"[A-Za-z0-9]+(?: [A-Za-z0-9]+)*", words):
        words = _code(words)
    return f"- {LABELS.get(name, name.capitalize())}: {', '.join([words, *_settings(node)])}"


def _words(node: Mapping[str, Any]) -> str:
    """The name of an option's class: TotalVariation is `Total variation`."""
    name = str(node.get("_target_", "")).rpartition(".")[2]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).split(" ")
    return " ".join(word if i == 0 or word.isupper() else word.lower() for i, word in enumerate(words))


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    node = config.get(name)
    return node if isinstance(node, Mapping) else {}


def _settings(node: Mapping[str, Any], skip: Collection[str] = ()) -> list[str]:
    """`key=value` for each key, as on the command line."""
    keys = [key for key in node if key != "_target_" and key not in skip]
    return [_code(f"{_text('', str(key))}={_text(str(key), node[key])}") for key in keys]


def _text(key: str, value: Any) -> str:
    """A value as on the command line, without what is not to be published."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return str(value)
    if SECRET.search(key):
        return "hidden"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_text('', str(k))}={_text(str(k), v)}" for k, v in value.items() if k != "_target_")
        return f"{_words(value)}({inner})" if "_target_" in value else f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(key, item) for item in value)}]"
    text = str(value)
    if key.endswith("pattern"):  # A regular expression may look like a path.
        return text
    if key.endswith(("path", "paths")) or text.startswith(("/", "~")):
        return _last(text)
    return FOLDERS.sub("", text)


def _last(path: str) -> str:
    return PurePosixPath(path).name or "."


def _code(text: str) -> str:
    """A code span: one line, whatever the text is."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or '""'
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    # Markdown takes away a space on both sides.
    pad = " " if line.startswith(("`", " ")) or line.endswith(("`", " ")) else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _literal(text: str) -> str:
    """A Python string in ASCII."""
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
