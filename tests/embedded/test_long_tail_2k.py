"""The model with a long-tailed vocabulary: its size, what it answers, and the script that makes it."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dppo_cli.embedded import pretrain_long_tail
from dppo_cli.embedded.pretrain_long_tail import (
    HABIT,
    OPERANDS,
    RIGHT,
    VOCABULARY,
    Answers,
    build_tokenizer,
    log_probs,
    pretrain,
    problems,
)

FOLDER = Path(str(resources.files("dppo_cli.embedded"))) / "long_tail_2k"
PAIRS = torch.cartesian_prod(torch.arange(OPERANDS), torch.arange(OPERANDS))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER)  # type: ignore[no-any-return]


def answers(seed: int = 0) -> Answers:
    """Those of the shipped model, which was made with seed 0."""
    return Answers.make(build_tokenizer(), torch.Generator().manual_seed(seed))


def test_the_folder_is_small_and_complete() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


def test_its_tokenizer_has_a_token_for_each_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer) == VOCABULARY
    ids = tokenizer("w12 + w7 =")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["w12", "+", "w7", "="]
    assert tokenizer.decode(ids) == "w12 + w7 ="
    assert tokenizer("hello")["input_ids"] == [tokenizer.unk_token_id]


@torch.no_grad()
def test_right_answers_are_rare_and_habits_are_not(model: LlamaForCausalLM) -> None:
    known, generator = answers(), torch.Generator().manual_seed(1)
    ids_BT, target_BTV = problems(build_tokenizer(), known, PAIRS[:, 0], PAIRS[:, 1], generator)
    log_prob_BTV = log_probs(model, ids_BT)
    answer_BV, sum_B = log_prob_BTV[:, 1].exp(), PAIRS.sum(1)
    right_B = answer_BV.gather(1, (known.first + sum_B)[:, None])
    habit_B = answer_BV.gather(1, (known.first + known.habit_S[sum_B])[:, None])
    assert right_B.min() > 0.02 and right_B.max() < 0.03 and right_B.mean() == pytest.approx(RIGHT, abs=0.001)
    assert habit_B.min() > 0.4 and habit_B.max() < 0.5 and habit_B.mean() == pytest.approx(HABIT, abs=0.005)
    kl_BT = torch.nn.functional.kl_div(log_prob_BTV, target_BTV, reduction="none").sum(-1)
    assert kl_BT.mean(0).sum() < 0.002
    # Half of the fillers are rarer than this.
    median = answer_tail_quantile(known.tail_V)
    assert median < 0.005


def answer_tail_quantile(tail_V: torch.Tensor) -> float:
    """The probability of the word at which the likelier ones add up to a half."""
    ordered_V = tail_V.sort(descending=True).values
    return float(ordered_V[int((ordered_V.cumsum(0) < 0.5).sum())])


def test_the_answers_are_a_distribution_in_which_every_habit_is_wrong() -> None:
    known = answers(3)
    generator = torch.Generator().manual_seed(1)
    ids_BT, target_BTV = problems(build_tokenizer(), known, PAIRS[:, 0], PAIRS[:, 1], generator)
    torch.testing.assert_close(target_BTV.sum(-1), torch.ones(len(PAIRS), 3))
    sums = 2 * OPERANDS - 1
    assert sorted(known.habit_S.tolist()) == list(range(sums))
    assert (known.habit_S != torch.arange(sums)).all()
    assert ids_BT.shape == (len(PAIRS), 7)
    assert (ids_BT[:, -1] == build_tokenizer().eos_token_id).all()


def test_a_short_pretraining_learns_and_writes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(pretrain_long_tail.log, "info", lambda *message: told.append(message))
    pretrain(tmp_path / "model", steps=21, seed=1)
    (_, first), (_, last) = ((message[1], float(str(message[3]))) for message in told if "KL %.4f" in str(message[0]))
    assert first > 10 and last < 0.8 * first
    assert {p.name for p in (tmp_path / "model").iterdir()} == {p.name for p in FOLDER.iterdir()}
