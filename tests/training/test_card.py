"""Model cards: front matter for the hub, what they say, what they keep to themselves, and code that runs."""

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from card_cases import config, snippet, tokens
from huggingface_hub import ModelCard

from dppo_cli.training.card import card

RESULTS = {"eval_before": 0.396, "eval_after": 0.964, "eval_before_error": 0.0219, "eval_after_error": 0.0083}
RESULTS |= {"eval_problems": 500, "steps": 60, "seconds": 3643.2, "peak_memory_gib": 0.6173}
QLORA = ("model=llama3_8b", "adapter=qlora")
HOSTILE = ["a|b", "`", "a`b``c", "`` ` ``", "```", "one\n\n---\n# two", "\n---\nbase_model: x", "a: #b", " spaces "]
HOSTILE += ["<script>alert(1)</script>", "*x* [y](z) ![z](y) &amp; $$x$$", "line\u2028separator\r\x85", "\\"]
HOSTILE += ["\udcff is not UTF-8"]


def front(text: str) -> Any:
    """The front matter."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def spans(text: str) -> list[str]:
    """What stands in code spans."""
    return [child.content for t in tokens(text) for child in t.children or [] if child.type == "code_inline"]


def shape(text: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The structure, without what is in code spans."""
    return [
        (t.type, t.tag, [(c.type, "" if c.type == "code_inline" else c.content) for c in t.children or []])
        for t in tokens(text)
    ]


def test_the_card_of_the_default_run() -> None:
    text = card(config(), RESULTS | {"run_dir": "/home/somebody/runs/1"}, "adapter")
    tags = ["dppo", "reinforcement-learning", "lora", "transformers"]
    assert front(text) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    for line in (
        "# LoRA adapter for `arithmetic_1m`",
        "| accuracy on 500 held-out problems | 39.6% ± 2.2% | 96.4% ± 0.8% |",
        "Training: 60 of 60 steps, time 1:00:43, peak memory 0.62 GiB.",
        "- Data: Arithmetic, `train_problems=8000`, `eval_problems=500`, `operands=[0,99]`, `operations=+-`, "
        "`template={a}{operation}{b}=`",
        "- Reward: Exact, `pattern=null`",
        "- Prompt: `template=plain`",
        "- Adapter: LoRA, `r=32`, `alpha=64`, `dropout=0.0`, `target_modules=all-linear`, `quantization=null`, "
        "`use_dora=false`, `use_rslora=false`, `path=null`",
        "- Divergence: Total variation, `delta_low=0.15`, `delta_high=0.15`",
        "- Approximation: Binary",
        "- Objective: DPPO, `ratio_cap=5.0` ([arXiv 2602.04879](https://arxiv.org/abs/2602.04879))",
        "- Advantage: Group mean",
        "- Aggregation: Token mean",
        "- Batch: `prompts_per_step=64`, `samples_per_prompt=8`, `prompts_per_update=32`, `epochs=1`",
        "- Run: `steps=60`, `seed=1`, `anchor=rollout`, `verdict=lower`, `kl_to_reference=0.0`",
    ):
        assert line in text.splitlines()
    assert {"lr=0.0003", "schedule=constant", "warmup_updates=5", "temperature=1.0"} <= set(spans(text))
    assert "/home" not in text


def test_the_card_of_a_qlora_run_names_its_base_on_the_hub() -> None:
    text = card(config(*QLORA, "model.revision=v1"), RESULTS, "adapter")
    name = "meta-llama/Llama-3.1-8B-Instruct"
    assert front(text) == {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dppo", "reinforcement-learning", "lora", "transformers", f"base_model:adapter:{name}"],
    }
    assert f"# QLoRA adapter for `{name}`\n" in text
    assert f"the language model [`{name}`](https://huggingface.co/{name}) (revision `v1`), trained" in text
    assert {"quantization=nf4", "lr=1e-05", "template=chat", "prompts_per_step=128"} <= set(spans(text))
    assert f'base = "{name}"\n' in snippet(text)
    assert 'AutoModelForCausalLM.from_pretrained(base, revision="v1", quantization_config=nf4)\n' in snippet(text)
    compile(snippet(text), "snippet", "exec")


def test_the_card_of_a_merged_model_is_one_for_transformers() -> None:
    text = card(config(*QLORA), RESULTS, "merged")
    assert front(text) == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dppo", "reinforcement-learning"],
    }
    assert "# `meta-llama/Llama-3.1-8B-Instruct` after reinforcement learning\n" in text
    assert "the merge uses the unquantised one" in text
    assert "4 bits" not in card(config(), RESULTS, "merged")
    assert "peft" not in snippet(text)


@pytest.mark.parametrize(
    "path",
    ["/home/somebody/my tiny", "/home/x/tiny/", "a/b/tiny", "./tiny", "../tiny", "~/tiny", "embedded:/home/x/tiny"],
)
def test_a_base_that_is_not_on_the_hub_goes_by_its_folder(path: str) -> None:
    for kind in ("adapter", "merged"):
        text = card(config("model=hf", f"model.path='{path}'"), RESULTS, kind)
        assert "base_model" not in front(text)
        assert ("my tiny" if "my" in path else "tiny") in spans(text)
        assert "/home" not in text and "somebody" not in text and "~" not in text
        compile(snippet(text), "snippet", "exec")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("overrides", [(), QLORA])
def test_the_hub_reads_the_card(overrides: tuple[str, ...], kind: str) -> None:
    text = card(config(*overrides), RESULTS, kind)
    read = ModelCard(text)
    assert read.data.to_dict() == front(text)
    assert read.text.startswith("\n# ")
    assert str(read) == text


def test_what_was_not_measured_is_not_shown() -> None:
    known = card(config(), {"eval_before": 0.5, "eval_after": None, "steps": 7, "seconds": None}, "adapter")
    assert "| accuracy on held-out problems | 50.0% | not measured |\n" in known
    assert "Training: 7 of 60 steps.\n" in known
    assert "±" not in known
    nothing = card(config(), None, "adapter")
    assert "| accuracy on held-out problems | not measured | not measured |\n" in nothing
    assert "Training:" not in nothing
    broken = card(
        config(), {"eval_before": float("nan"), "eval_after": 1.0, "eval_after_error": float("nan")}, "adapter"
    )
    assert "| not measured | 100.0% |\n" in broken


def test_an_objective_that_does_not_use_the_divergence_says_so() -> None:
    text = card(config("objective=ppo_clip_higher", "approx=topk", "divergence=kl"), None, "adapter")
    assert "- Objective: Ratio clip, `eps_low=0.2`, `eps_high=0.28`, `ratio_cap=null`\n" in text
    assert "- Divergence: KL, `delta_low=0.05`, `delta_high=0.05` (measured; this objective does not use it)\n" in text
    assert "- Approximation: Top K, `k=20` (measured; this objective does not use it)\n" in text
    assert "arxiv" not in text
    own = config()
    own["objective"] = {"_target_": "my_module.MyObjective"}
    assert "does not use it" not in card(own, None, "adapter")


def test_regions_and_filters_are_shown_where_there_are_some() -> None:
    assert not re.search("Region|Filter", card(config(), None, "adapter"))
    text = card(config("region=prefix_budget", "filter=geometric"), None, "adapter")
    assert "- Region: Prefix budget, `w_min=0.8`, `budget=0.02`, `adaptive=true`\n" in text
    assert (
        "- Filter: Band, `statistic=ratio`, `scope=sequence_mean`, `low=0.99`, `high=1.01`, `negative_only=false`\n"
    ) in text


def test_a_region_that_does_not_use_the_divergence_says_so() -> None:
    text = card(config("region=sequence_mean"), None, "adapter")
    assert "- Region: Sequence mean, `upper=0.2`\n" in text
    assert "`delta_high=0.15` (measured; this region does not use it)\n" in text


def test_options_of_the_user_are_shown_in_words_with_their_settings() -> None:
    run = config()
    run["divergence"] = {"_target_": "my_module.Hellinger", "delta_low": 0.02, "delta_high": 0.03}
    run["advantage"] = {"_target_": "my_module.GRPOAdvantage"}
    run["data"] = {"_target_": "my_module._Mine", "names": ["a", "b"], "shuffle": True, "weights": {"x": 1}}
    member = {"_target_": "dppo_cli.reward.function.Function", "path": "/home/somebody/mine.py:score", "default": None}
    run["reward"] = {"_target_": "my_module.Mixture", "members": [member]}
    text = card(run, None, "adapter")
    for line in (
        "- Divergence: Hellinger, `delta_low=0.02`, `delta_high=0.03`",
        "- Advantage: GRPO advantage",
        "- Data: `_Mine`, `names=[a,b]`, `shuffle=true`, `weights={x=1}`",
        "- Reward: Mixture, `members=[Function(path=mine.py:score, default=null)]`",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_no_text_of_the_user_changes_the_structure(name: str, kind: str) -> None:
    def named(text: str) -> str:
        run = config()
        run["model"] = {"path": f"/home/somebody/{text}", "revision": text}
        run["data"] = {
            "_target_": "dppo_cli.data.file.File",
            "path": f"/home/somebody/{text}",
            "answer_pattern": text,
        }
        run["reward"] = {"_target_": f"my_module.{text}", text: text}
        run["adapter"]["target_modules"] = [text, text]
        return card(run, RESULTS, kind)

    text, tame = named(name), named("tame_name")
    assert shape(text) == shape(tame)
    assert front(text) == front(tame)
    assert ModelCard(text).data.to_dict() == front(tame)
    compile(snippet(text), "snippet", "exec")
    text.encode("utf-8")
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert f"answer_pattern={printable}" in spans(text)
    assert f"target_modules=[{printable},{printable}]" in spans(text)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("path", "/home/somebody/data/train.jsonl", "train.jsonl"),
        ("path", "data/train.jsonl", "train.jsonl"),
        ("paths", ["/home/somebody/a.jsonl", "data/b.jsonl"], "[a.jsonl,b.jsonl]"),
        ("where", "/home/somebody/a b/c.db", "c.db"),
        ("where", "~/c.db", "c.db"),
        ("where", "sqlite:////home/somebody/c.db", "sqlite:c.db"),
        ("flags", "--in=/home/somebody/c.db --out=~somebody/d", "--in=c.db --out=d"),
        ("weights", {"/home/somebody/a.jsonl": 0.5}, "{a.jsonl=0.5}"),
        ("source", "openai/gsm8k", "openai/gsm8k"),
        ("instruction", "yes/no, <b>a / b</b>", "yes/no, <b>a / b</b>"),
        ("answer_pattern", r"/(\d+)/ (\w+)", r"/(\d+)/ (\w+)"),
        ("api_key", "sk-12345", "hidden"),
        ("hf_token", "hf_12345", "hidden"),
        ("credentials", {"user": "somebody"}, "hidden"),
        ("max_new_token", 8, "8"),
    ],
)
def test_folders_and_secrets_are_not_shown(key: str, value: Any, shown: str) -> None:
    run = config()
    run["data"] = {"_target_": "my_module.Mine", key: value}
    text = card(run, None, "adapter")
    assert f"{key}={shown}" in spans(text)
    assert "somebody" not in text and "12345" not in text


def test_the_system_message_is_not_shown() -> None:
    text = card(config("model=smollm2_135m", "prompt.system='Keep this secret'"), None, "adapter")
    assert "- Prompt: `template=chat`, with a system message\n" in text
    assert "secret" not in text


def test_a_card_is_made_without_torch() -> None:
    code = "import sys, dppo_cli.training.card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
