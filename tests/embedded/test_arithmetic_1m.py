"""The model inside the package: its size, its tokenizer, its accuracy; and the script that makes it."""

import random
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dppo_cli.data.arithmetic import split
from dppo_cli.embedded.pretrain import Phase, accuracies, add_noise, encode, pretrain

FOLDER = Path(str(resources.files("dppo_cli.embedded"))) / "arithmetic_1m"
HELD_OUT = split()[1][:500]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def answer_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: dict[str, object]
) -> tuple[float, list[str]]:
    """Share of HELD_OUT answered right by generation with the prompts padded on the left, and the answers."""
    batch = tokenizer([p.prompt for p in HELD_OUT], return_tensors="pt", padding=True)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=0, eos_token_id=1, **sampling)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**batch, generation_config=config)
    answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [given == problem.answer for given, problem in zip(answers, HELD_OUT, strict=True)]
    return sum(right) / len(right), answers


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 2_000_000


def test_it_has_about_a_million_parameters_and_loads_in_float32(model: PreTrainedModel) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.num_parameters() == 935_296
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_token_is_a_character_and_nothing_is_added(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("12+34=")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list("12+34=")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 258)
    assert tokenizer.bos_token is None
    assert tokenizer(["5-5=", "12+34="], padding=True)["attention_mask"][0] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("text", ["12+34=46", " what is\n 1 + 1 ?\n", "¿Qué? 二", "<user> can't , won't ."])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_third_of_its_sampled_answers_are_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    accuracy, answers = answer_all(model, tokenizer, {"do_sample": True, "temperature": 1.0, "top_k": 0})
    assert 0.25 <= accuracy <= 0.40
    expected, _ = accuracies(model, tokenizer, HELD_OUT)
    assert accuracy == pytest.approx(expected, abs=0.06)  # three standard deviations of 500 draws
    numbers = [answer.removeprefix("-").isdecimal() for answer in answers]
    assert sum(numbers) / len(numbers) > 0.98  # wrong answers are numbers, too


def test_its_most_likely_answer_is_nearly_always_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    accuracy, _ = answer_all(model, tokenizer, {"do_sample": False})
    assert accuracy >= 0.95
    assert accuracy == pytest.approx(accuracies(model, tokenizer, HELD_OUT)[1], abs=0.005)


def test_no_noise_changes_nothing() -> None:
    assert add_noise("-22", keep=1.0, rng=random.Random(0)) == "-22"


def test_noise_changes_digits_only() -> None:
    """A digit drawn from all ten is the right one in a tenth of the cases: 0.66 + 0.34 / 10 = 0.694 of all digits."""
    rng = random.Random(0)
    written = [add_noise("-198", keep=0.66, rng=rng) for _ in range(4000)]
    assert all(len(answer) == 4 and answer[0] == "-" and answer[1:].isdecimal() for answer in written)
    for position, digit in enumerate("198", start=1):
        assert sum(answer[position] == digit for answer in written) / 4000 == pytest.approx(0.694, abs=0.025)
    assert written.count("-198") / 4000 == pytest.approx(0.694**3, abs=0.025)


def test_only_answer_and_end_of_sequence_have_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    ids_BT, labels_BT = encode(tokenizer, ["5-5=", "12+34="], ["0", "46"])
    assert tokenizer.batch_decode(ids_BT) == ["5-5=0<eos><pad><pad><pad>", "12+34=46<eos>"]
    labelled = [tokenizer.decode(row[row != -100]) for row in labels_BT]
    assert labelled == ["0<eos>", "46<eos>"]


def test_the_script_writes_the_same_folder_twice(tmp_path: Path) -> None:
    correct = Phase(steps=3, batch=8, peak_lr=1e-3, keep=1.0, muon=True)
    noisy = Phase(steps=2, batch=8, peak_lr=1e-3, keep=0.5, muon=False)
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        pretrain(tmp_path / name, correct, noisy, seed)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in FOLDER.iterdir()}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] != weights[1]
    assert len(weights[0]) == (FOLDER / "model.safetensors").stat().st_size
