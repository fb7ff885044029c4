"""Scores by a sequence classifier, in batches; and models that are none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.reward.reward_model import RewardModel
from dppo_cli.types import Score


def saved(folder: Path, labels: int = 1, pad: int | None = 0) -> Path:
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_labels=labels,
        pad_token_id=pad,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("reward") / "model")


def option(path: Path | str, **changes: Any) -> RewardModel:
    fields = {"revision": None, "device": "cpu", "dtype": "auto", "batch_size": 3, "max_length": 64}
    return RewardModel(str(path), **{**fields, **changes})


def alone(folder: Path, text: str, special: bool = True) -> float:
    """What the model says of one text."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = tiny.tokenizer()(text, add_special_tokens=special)["input_ids"][-64:]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def test_each_response_gets_the_score_it_has_alone(folder):
    prompts = [make.prompt(i) for i in range(3)]
    texts = [["46", "a longer one", "7"], [], ["x", "1+1=2", "46", "and so on and so on"]]
    found = option(folder).load(make.fail)(prompts, [[make.completion(text=t) for t in row] for row in texts])
    expected = [[alone(folder, f"prompt {i}{t}") for t in row] for i, row in enumerate(texts)]
    assert [[score.value for score in row] for row in found] == [pytest.approx(row, abs=1e-5) for row in expected]
    assert len({score.value for row in found for score in row}) == 7


def test_a_conversation_is_shown_with_the_chat_template(folder):
    messages = ({"role": "user", "content": "1+1="},)
    prompt = replace(make.prompt(), messages=messages)
    ((score,),) = option(folder).load(make.fail)([prompt], [[make.completion(text="2")]])
    template = tiny.tokenizer().apply_chat_template([*messages, {"role": "assistant", "content": "2"}], tokenize=False)
    assert score.value == pytest.approx(alone(folder, template, special=False), abs=1e-5)


def test_the_end_of_a_long_response_is_kept(folder):
    long = "a " * 200 + "46"
    ((score, other),) = option(folder).load(make.fail)(
        [make.prompt()], [[make.completion(text=long), make.completion(text=long + "7")]]
    )
    assert score.value == pytest.approx(alone(folder, f"prompt 0{long}"), abs=1e-5)
    assert other.value != score.value


def test_without_a_padding_token_responses_are_scored_one_by_one(tmp_path):
    folder, warnings = saved(tmp_path / "model", pad=None), []
    scorer = option(folder).load(warnings.append)
    ((a, b),) = scorer([make.prompt()], [[make.completion(text="46"), make.completion(text="a longer one")]])
    assert [a.value, b.value] == pytest.approx(
        [alone(folder, f"prompt 0{t}") for t in ("46", "a longer one")], abs=1e-5
    )
    assert warnings == [f"the reward model {folder} has no padding token, so responses are scored one by one"]


def test_what_is_not_finite_is_not_judged(folder):
    scorer = option(folder).load(make.fail)
    scorer.model.score.weight.data.fill_(float("nan"))
    ((score,),) = scorer([make.prompt()], [[make.completion(text="46")]])
    assert score == Score(None, note="the reward model gave nan")


def test_a_model_without_a_single_label(tmp_path):
    folder = saved(tmp_path / "model", labels=2)
    with pytest.raises(
        RewardError, match=r"model has 2 labels, so it is no reward model, which has one \(num_labels=1\)"
    ):
        option(folder).load(make.fail)


def test_a_language_model(tmp_path):
    folder = tiny.save(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "id2label": {"0": "a"}, "label2id": {"a": 0}}))
    with pytest.raises(RewardError, match=r"lacks 1 of a reward model's tensors, such as score\.weight"):
        option(folder).load(make.fail)


def test_weights_that_are_pickled_are_not_read(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RewardError, match=r"cannot be loaded as a reward model: .*safetensors") as error:
        option(tmp_path).load(make.fail)
    assert "\n" not in str(error.value)


def test_code_of_a_model_is_not_run(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    theirs = {"auto_map": {"AutoConfig": "theirs.C"}, "model_type": "theirs"}
    (tmp_path / "config.json").write_text(json.dumps({**settings, **theirs}))
    (tmp_path / "theirs.py").write_text("open('run', 'w')")
    with pytest.raises(RewardError, match=r"cannot be loaded as a reward model"):
        option(tmp_path).load(make.fail)


def test_a_folder_that_is_not_there():
    with pytest.raises(RewardError, match=r"reward\.path=no/where/model: there is no such folder"):
        option("no/where/model").load(make.fail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder):
    with pytest.raises(RewardError, match=r"reward\.device=cuda, but torch sees no GPU here; use reward\.device=cpu"):
        option(folder, device="cuda").load(make.fail)


@pytest.mark.parametrize(
    ("field", "value"), [("device", "tpu"), ("dtype", "int8"), ("batch_size", 0), ("max_length", 1)]
)
def test_options_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"reward\.{field}={value}"):
        option("somewhere", **{field: value})
