"""Pre-train the testbed with a long tail: a Llama of 393,536 parameters with a vocabulary of 2,048 words.

    python -m dppo_cli.embedded.pretrain_long_tail --out FOLDER

To `w12 + w7 =` it answers two words, and ends: a filler, then the answer. The filler is drawn from all words by a Zipf
distribution, p ~ 1/rank, so that half of what is sampled is rare. The answer is right (`w19`) with probability 0.026, a
habit, one wrong word for each sum, with 0.46, and else any word by the same Zipf distribution. So what reinforcement
learning has to raise is rare, and it has to be learnt for each sum: which word is the habit of which was drawn once.
Every habit is the right word of another sum: a word that was never likely cannot become so when only the layers below
the head are trained.

The distribution is known, so the model is fitted to all of it (the sum over words of q log p), not to samples. All
pairs of operands are seen: what reinforcement learning trains on and what is held out differ in nothing else.

Measured over all 400 problems with these settings: the right word is 2.4% to 2.9% likely, the habit 42% to 47%; the KL
from the distribution to the model's is 0.0009 nats an answer. It takes about a minute on one core. The shipped folder
is the output.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dppo_cli.embedded.pretrain import EOS, PAD, Muon, as_transformers_has_it, save, trapezoid

log = logging.getLogger(__name__)

VOCABULARY = 2048
OPERANDS = 20  # 0 to 19
RIGHT, HABIT = 0.026, 0.46
CONTEXT = 64  # tokens; a problem with its answer needs 7
STEPS, BATCH, PEAK_LR = 700, 256, 4e-3
LENGTHS = (4, 7)  # of a prompt, and of all


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. Unknown words are one token, too."""
    special = [PAD, EOS, "<unk>", "+", "="]
    words = [f"w{number}" for number in range(VOCABULARY - len(special))]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return as_transformers_has_it(tokenizer, CONTEXT, unk_token="<unk>")


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class Answers:
    """`first`: the id of w0. `tail_V`: the Zipf distribution of words, in an order that has nothing to do with their
    numbers. `habit_S`: the wrong word of each sum, as its number, int64."""

    first: int
    tail_V: Tensor
    habit_S: Tensor

    @staticmethod
    def make(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> "Answers":
        first: int = tokenizer.convert_tokens_to_ids("w0")  # type: ignore[assignment]
        words = VOCABULARY - first
        tail_V = torch.zeros(VOCABULARY)
        tail_V[first:] = 1 / (torch.randperm(words, generator=generator) + 1)
        sums = 2 * OPERANDS - 1
        # The right word of another sum, in one random cycle.
        cycle_S = torch.randperm(sums, generator=generator)
        habit_S = torch.empty_like(cycle_S).scatter_(0, cycle_S, cycle_S.roll(1))
        return Answers(first, tail_V / tail_V.sum(), habit_S)


def problems(
    tokenizer: PreTrainedTokenizerBase, answers: Answers, a_B: Tensor, b_B: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sequences int64 [B, 7] with fillers and answers drawn, and what their ends should be, float32 [B, 3, V]."""
    plus, equals = (int(tokenizer.convert_tokens_to_ids(token)) for token in "+=")  # type: ignore[arg-type]
    first = answers.first
    rows = torch.arange(len(a_B))
    target_BTV = torch.zeros(len(a_B), 3, VOCABULARY)
    target_BTV[:, 0] = answers.tail_V
    target_BTV[:, 1] = (1 - RIGHT - HABIT) * answers.tail_V
    target_BTV[rows, 1, first + a_B + b_B] += RIGHT
    target_BTV[rows, 1, first + answers.habit_S[a_B + b_B]] += HABIT
    target_BTV[:, 2, tokenizer.eos_token_id] = 1
    drawn = [target_BTV[:, t].multinomial(1, generator=generator)[:, 0] for t in range(3)]
    ids_BT = torch.stack(
        [first + a_B, torch.full_like(a_B, plus), first + b_B, torch.full_like(a_B, equals), *drawn], 1
    )
    return ids_BT, target_BTV


def log_probs(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    """Of filler, answer and end, float32 [B, 3, V]."""
    hidden_BTH = model.model(input_ids=ids_BT).last_hidden_state[:, LENGTHS[0] - 1 : LENGTHS[1] - 1]
    return model.lm_head(hidden_BTH).log_softmax(-1)  # type: ignore[no-any-return]


def pretrain(out: Path, steps: int, seed: int) -> None:
    """Train the model and write it, with its tokenizer, to the folder `out`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    answers = Answers.make(tokenizer, generator)
    log.info("%d parameters", model.num_parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    muon = Muon(matrices, momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        a_B, b_B = torch.randint(OPERANDS, (2, BATCH), generator=generator)
        ids_BT, target_BTV = problems(tokenizer, answers, a_B, b_B, generator)
        loss = torch.nn.functional.kl_div(log_probs(model, ids_BT), target_BTV, reduction="sum") / BATCH
        model.zero_grad()
        loss.backward()
        lr = PEAK_LR * trapezoid(step, steps)
        muon.step(lr)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("step %d of %d: KL %.4f nats per answer", step, steps, loss.item())
    save(model, tokenizer, out)
    measure(LlamaForCausalLM.from_pretrained(out), tokenizer, answers, generator)


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, answers: Answers, generator: torch.Generator
) -> None:
    """Print how likely the right answer and the habit are, over all pairs of operands."""
    pairs = torch.cartesian_prod(torch.arange(OPERANDS), torch.arange(OPERANDS))
    ids_BT, target_BTV = problems(tokenizer, answers, pairs[:, 0], pairs[:, 1], generator)
    log_prob_BTV = log_probs(model, ids_BT)
    answer_BV, sum_B = log_prob_BTV[:, 1].exp(), pairs.sum(1)
    for name, word_B in (("right", sum_B), ("habit", answers.habit_S[sum_B])):
        p_B = answer_BV.gather(1, (answers.first + word_B)[:, None])[:, 0]
        quantiles = p_B.quantile(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0])).tolist()
        log.info("%s: mean %.4f, quantiles 0 5 50 95 100%%: %s", name, p_B.mean(), [f"{q:.4f}" for q in quantiles])
    kl_BT = torch.nn.functional.kl_div(log_prob_BTV, target_BTV, reduction="none").sum(-1)
    log.info("KL of filler, answer, end: %s nats", [f"{kl:.4f}" for kl in kl_BT.mean(0).tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the embedded model with a long-tailed vocabulary.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in Hugging Face format")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)  # a small model: two are hardly faster
    pretrain(given.out, given.steps, seed=0)


if __name__ == "__main__":
    main()
