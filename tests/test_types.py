"""The layout of a batch, and what the types refuse."""

import make
import pytest
import torch

from dppo_cli.types import (
    Batch,
    Completion,
    Example,
    Group,
    PaddedPrompts,
    PolicyReport,
    Prompt,
    Sample,
    Score,
    Status,
    TokenStats,
)

CPU = torch.device("cpu")


class DoublingHead:
    """Stands for a language-model head: its "log-probs" are twice the hidden states."""

    def log_probs(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return 2 * hidden_NH


def report(start: int, n: int, head: DoublingHead | None = None) -> PolicyReport:
    """Rows that can be told apart: row i holds numbers from start + i."""
    i_N = torch.arange(start, start + n)
    return PolicyReport(
        -i_N.float(),
        i_N[:, None] * 10 + torch.arange(3),
        -i_N[:, None] - torch.arange(3) / 10,
        i_N[:, None].float() + torch.arange(2) / 10,
        head or DoublingHead(),
    )


def packed(prompts: list[tuple[int, ...]], *samples: Sample, pad_id: int = 99) -> Batch:
    return Batch.pack(samples, prompts, pad_id, CPU)


def sample(advantage: float, prompt: int = 0, **made: object) -> Sample:
    completion = make.completion(**made)
    return Sample(prompt, completion, advantage, completion.mu)


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    batch = packed(
        [(12,), (3, 4), (8,)],
        sample(0.5, prompt=1, token_ids=(5, 6, 7), logp=(-1.0, -2.0, -3.0)),
        sample(-1.0, prompt=2, token_ids=(9,), logp=(-4.0,)),
        sample(2.0, prompt=1, token_ids=(11, 12), logp=(-5.0, -6.0)),
    )
    assert batch.prompts.ids_PL.tolist() == [[3, 4], [99, 8]], "the prompt of two samples comes once"
    assert batch.number_P == (1, 2), "a prompt without samples is left out"
    assert batch.prompts.length_P1.tolist() == [[2], [1]]
    assert batch.prompts.positions().tolist() == [[0, 1], [0, 0]]
    assert batch.prompts.mask(1).tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.prompt_B.tolist() == [0, 1, 0]
    assert batch.response_ids_BR.tolist() == [[5, 6, 7], [9, 99, 99], [11, 12, 99]]
    assert batch.length_B.tolist() == [3, 1, 2]
    assert batch.token_N.tolist() == [5, 6, 7, 9, 11, 12]
    assert batch.row_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.position_N.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.advantage_N.tolist() == [0.5, 0.5, 0.5, -1.0, 2.0, 2.0]
    assert batch.advantage_N.dtype == torch.float32
    assert batch.mu.logp_N.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert (batch.num_positions, batch.num_tokens) == (9, 6), "those of the responses"
    assert batch.prompts.token_ids == ((3, 4), (8,))
    assert batch.whole_ids(99).tolist() == [[3, 4, 5, 6, 7], [8, 9, 99, 99, 99], [3, 4, 11, 12, 99]]


def test_equal_prompts_of_two_groups_stay_two():
    """They have different numbers, and each group's samples belong to its own."""
    batch = packed([(3, 4), (3, 4)], sample(1.0, prompt=1), sample(1.0, prompt=0))
    assert batch.number_P == (1, 0)
    assert batch.prompts.ids_PL.tolist() == [[3, 4], [3, 4]]
    assert batch.prompt_B.tolist() == [0, 1]


def test_prompts_of_one_length_need_no_mask():
    assert PaddedPrompts.pad([(3, 4), (5, 6)], 99, CPU).mask(4) is None


def test_tokens_that_were_not_sampled_stay_in_the_sequence_only():
    sampled = (False, True, False, False, True)
    batch = packed([(3, 4)], sample(1.0, token_ids=(5, 6, 7, 8, 9), sampled=sampled, logp=(-1.0, -2.0)))
    assert batch.response_ids_BR.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.token_N.tolist() == [6, 9]
    assert batch.position_N.tolist() == [1, 4]
    assert batch.mu.logp_N.tolist() == [-1.0, -2.0]


def test_the_anchor_is_the_samples_own():
    completion = make.completion(token_ids=(5, 6), logp=(-1.0, -2.0))
    anchor = PolicyReport(torch.tensor([-7.0, -8.0]))
    batch = packed([(3,)], Sample(0, completion, 1.0, anchor))
    assert batch.mu.logp_N.tolist() == [-1.0, -2.0]
    assert batch.anchor.logp_N.tolist() == [-7.0, -8.0]


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([False, True, True, False]), torch.tensor([1, 2])])
def test_rows_of_a_report(rows):
    whole, expected = report(0, 4), report(1, 2)
    part = whole[rows]
    assert torch.equal(part.logp_N, expected.logp_N)
    assert torch.equal(part.topk_ids_NK, expected.topk_ids_NK)
    assert torch.equal(part.topk_logp_NK, expected.topk_logp_NK)
    assert torch.equal(part.full_log_probs(), expected.full_log_probs())
    assert part.head is whole.head


def test_reports_one_after_the_other():
    head = DoublingHead()
    joined, expected = PolicyReport.cat([report(0, 3, head), report(3, 1, head)]).to(CPU), report(0, 4)
    assert torch.equal(joined.logp_N, expected.logp_N)
    assert torch.equal(joined.topk_ids_NK, expected.topk_ids_NK)
    assert torch.equal(joined.topk_logp_NK, expected.topk_logp_NK)
    assert torch.equal(joined.full_log_probs(), expected.full_log_probs())
    assert joined.head is head


def test_a_short_report_stays_short():
    short = PolicyReport(torch.zeros(3))
    for derived in (short[:2], short.to(CPU), PolicyReport.cat([short, short])):
        assert (derived.topk_ids_NK, derived.topk_logp_NK, derived.hidden_NH, derived.head) == (None,) * 4
    assert PolicyReport.cat([short, short]).logp_N.shape == (6,)
    with pytest.raises(AssertionError):
        short.full_log_probs()


IDS, VALUES = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "columns",
    [
        {"logp_N": torch.zeros(2, dtype=torch.float64)},
        {"logp_N": torch.zeros(2, dtype=torch.bfloat16)},
        {"logp_N": torch.zeros(2, 1)},
        {"topk_ids_NK": IDS},
        {"topk_logp_NK": VALUES},
        {"topk_ids_NK": IDS, "topk_logp_NK": VALUES[:, :2]},
        {"topk_ids_NK": IDS[:1], "topk_logp_NK": VALUES[:1]},
        {"hidden_NH": VALUES},
        {"head": DoublingHead()},
        {"hidden_NH": VALUES[:1], "head": DoublingHead()},
    ],
)
def test_a_report_that_does_not_fit_together(columns):
    with pytest.raises(AssertionError):
        PolicyReport(**{"logp_N": torch.zeros(2), **columns})


@pytest.mark.parametrize(
    "columns",
    [
        {"token_ids_T": torch.tensor([1, 2, 3], dtype=torch.int32)},
        {"token_ids_T": torch.tensor([[1, 2, 3]])},
        {"sampled_T": torch.tensor([1, 1, 0])},
        {"sampled_T": torch.tensor([True, True])},
        {"sampled_T": torch.tensor([True, True, True])},
        {"mu": PolicyReport(torch.zeros(3))},
    ],
)
def test_a_completion_that_does_not_fit_together(columns):
    fitting = {
        "token_ids_T": torch.tensor([1, 2, 3]),
        "sampled_T": torch.tensor([True, True, False]),
        "mu": PolicyReport(torch.zeros(2)),
        "text": "",
        "status": Status.FINISHED,
        "versions": (0,),
    }
    Completion(**fitting)
    with pytest.raises(AssertionError):
        Completion(**{**fitting, **columns})


def test_a_prompt_has_tokens():
    with pytest.raises(AssertionError, match="prompt 7 has no tokens"):
        Prompt(7, Example("", ""), ())


def test_a_batch_checks_its_columns():
    whole = packed([(3,)], sample(1.0, token_ids=(5, 6)))
    fields = {name: getattr(whole, name) for name in Batch.__dataclass_fields__}
    for name in ("row_N", "position_N", "advantage_N", "token_N", "mu", "anchor"):
        with pytest.raises(AssertionError):
            Batch(**{**fields, name: fields[name][:1]})
    with pytest.raises(AssertionError):
        Batch(**{**fields, "response_ids_BR": fields["response_ids_BR"].int()})


def test_a_group_has_a_score_for_each_completion():
    completions = [make.completion(), make.completion()]
    scores = [Score(1.0), Score(None, note="timed out")]
    anchors = [c.mu for c in completions]
    Group(make.prompt(), [], [])
    Group(make.prompt(), completions, scores)  # as in an evaluation, without advantages
    Group(make.prompt(), completions, scores, [0.5, 0.0], anchors)
    for refused in (
        (scores[:1],),
        (scores, [0.5]),
        (scores, [0.5, 0.0], anchors[:1]),
    ):
        with pytest.raises(AssertionError):
            Group(make.prompt(), completions, *refused)


def test_statistics_of_several_micro_batches():
    """Column by column, one after the other."""

    def numbered(start: int, n: int) -> TokenStats:
        return TokenStats(*(torch.arange(start, start + n) + 10 * column for column in range(11)))

    joined, expected = TokenStats.cat([numbered(0, 2), numbered(2, 3)]), numbered(0, 5)
    for name in TokenStats.__dataclass_fields__:
        assert torch.equal(getattr(joined, name), getattr(expected, name))
