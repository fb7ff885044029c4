import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, ULP, Pair, likeliest, logs, merged, pairs
from torch import Tensor

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Binary, Full, TopK, binary_support, topk_support
from dppo_cli.algorithm.divergence import KL, TotalVariation
from dppo_cli.algorithm.objective import trust_mask
from dppo_cli.errors import ConfigError
from dppo_cli.types import PolicyReport

TV = TotalVariation(0.15, 0.15)
NATS = KL(0.05, 0.05)
# A float32 sum of up to ten probabilities, and their rounding from logarithms.
ATOL = 1e-6
FLOOR = math.log(ULP)

MU = [0.40, 0.30, 0.15, 0.10, 0.05]
PI = [0.10, 0.30, 0.20, 0.10, 0.30]


def topk(pair: Pair, k: int) -> tuple[Tensor, Tensor]:
    """Both policies on the support of K = k, from what an engine would report."""
    log_mu, log_pi = pair.logs
    ids = torch.tensor([likeliest(pair.mu, k)])
    token = torch.tensor([pair.token])
    return topk_support(token, log_mu[:, pair.token], ids, log_mu.gather(-1, ids), log_pi)


def binary(pair: Pair) -> tuple[Tensor, Tensor]:
    log_mu, log_pi = pair.logs
    return binary_support(log_mu[:, pair.token], log_pi[:, pair.token])


def probabilities(support: tuple[Tensor, Tensor]) -> tuple[list[float], list[float]]:
    return support[0].double().exp()[0].tolist(), support[1].double().exp()[0].tolist()


def kl_tolerance(mu: list[float], pi: list[float]) -> float:
    """The mass of `other` (last) is a difference with an absolute error of some ULP; KL's slope in it is mu / pi."""
    return ATOL + 8 * ULP * (1 + mu[-1] / pi[-1] + abs(math.log(max(mu[-1], ULP) / pi[-1])))


def test_binary_by_hand():
    mu, pi = binary_support(logs([0.4, 0.9])[0], logs([0.1, 0.95])[0])
    torch.testing.assert_close(mu.exp(), torch.tensor([[0.4, 0.6], [0.9, 0.1]]), atol=ATOL, rtol=0)
    torch.testing.assert_close(pi.exp(), torch.tensor([[0.1, 0.9], [0.95, 0.05]]), atol=ATOL, rtol=0)
    # TV is |mu(a) - pi(a)|: the 1/2 cancels against the two equal terms.
    torch.testing.assert_close(TV(mu, pi), torch.tensor([0.3, 0.05]), atol=ATOL, rtol=0)
    kl = 0.4 * math.log(0.4 / 0.1) + 0.6 * math.log(0.6 / 0.9)
    assert NATS(mu, pi)[0].item() == pytest.approx(kl, abs=ATOL)


@pytest.mark.parametrize("logp", [-1e-6, -1e-4, -2e-3, -0.5, -3.0, -15.0])
def test_edge_2_complement_keeps_its_digits(logp):
    found = binary_support(torch.tensor([logp]), torch.tensor([logp]))[0][0, 1].item()
    exact = math.log(-math.expm1(torch.tensor(logp).item()))
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("logp", [0.0, 1e-7, -1e-9])
def test_edge_2_probability_of_one(logp):
    """Exactly 1, above it by rounding, and so near that 1 - p is below the resolution of float32."""
    mu, pi = binary_support(torch.tensor([logp]), torch.tensor([math.log(0.5)]))
    assert mu[0].tolist() == pytest.approx([0.0, FLOOR], abs=ATOL) and mu[0, 0] <= 0
    # The floor itself costs 2^-24 * log(2^-24 / 0.5), about 1e-6.
    assert NATS(mu, pi).item() == pytest.approx(math.log(2), abs=2e-6)
    assert TV(mu, pi).item() == pytest.approx(0.5, abs=ATOL)


def test_edge_2_probability_of_one_under_pi_is_finite_and_large():
    mu, pi = binary_support(torch.tensor([math.log(0.5)]), torch.tensor([0.0]))
    assert NATS(mu, pi).item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - FLOOR), abs=2e-6)


def test_edge_3_sampled_token_without_mass_under_pi():
    mu, pi = binary_support(torch.tensor([math.log(0.5)]), torch.tensor([-math.inf]))
    assert pi[0].tolist() == [-math.inf, 0.0]
    assert TV(mu, pi).item() == pytest.approx(0.5, abs=ATOL)
    assert NATS(mu, pi).tolist() == [math.inf]
    assert NATS(pi, mu).item() == pytest.approx(math.log(2), abs=ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edge_2_binary_upcasts_first(dtype):
    # 0.9985 would round to 1 as a bfloat16 probability; as a log-prob it keeps its digits.
    logp = torch.tensor([-1.5e-3]).to(dtype)
    found = binary_support(logp, logp)[0]
    assert found.dtype == torch.float32
    assert found[0, 1].item() == pytest.approx(math.log(-math.expm1(logp.item())), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edge_2_topk_upcasts_first(dtype):
    log_mu, log_pi, ids, token = logs(MU).to(dtype), logs(PI).to(dtype), torch.tensor([[0, 1]]), torch.tensor([3])
    low = topk_support(token, log_mu[:, 3], ids, log_mu[:, :2], log_pi)
    high = topk_support(token, log_mu[:, 3].float(), ids, log_mu[:, :2].float(), log_pi.float())
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_edge_11_token_inside_the_topk():
    mu, pi = probabilities(topk(Pair(MU, PI, token=1), k=3))
    assert mu == pytest.approx([0.40, 0.30, 0.15, 0.0, 0.15], abs=ATOL)
    assert pi == pytest.approx([0.10, 0.30, 0.20, 0.0, 0.40], abs=ATOL)


def test_edge_11_token_outside_the_topk_is_added_and_replaces_nothing():
    support = topk(Pair(MU, [0.1, 0.5, 0.1, 0.1, 0.2], token=4), k=2)
    mu, pi = probabilities(support)
    assert mu == pytest.approx([0.40, 0.30, 0.05, 0.25], abs=ATOL)
    assert pi == pytest.approx([0.10, 0.50, 0.20, 0.20], abs=ATOL)
    # In place of the second token it would be (0.3 + 0.15 + 0.15) / 2.
    assert TV(*support).item() == pytest.approx((0.3 + 0.2 + 0.15 + 0.05) / 2, abs=ATOL)


def test_support_comes_from_mu_alone():
    # pi's likeliest tokens are 4 and 1; mu's are 0 and 1.
    mu, pi = probabilities(topk(Pair(MU, [0.05, 0.30, 0.05, 0.1, 0.5], token=0), k=2))
    assert mu == pytest.approx([0.40, 0.30, 0.0, 0.30], abs=ATOL)
    assert pi == pytest.approx([0.05, 0.30, 0.0, 0.65], abs=ATOL)


def test_edge_6_tokens_are_matched_by_id_never_by_position():
    log_mu, log_pi, token = logs(MU), logs(PI), torch.tensor([2])
    found = []
    for ids in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        ids_13 = torch.tensor([ids])
        support = topk_support(token, log_mu[:, 2], ids_13, log_mu.gather(-1, ids_13), log_pi)
        assert support[0][0, :3].tolist() == log_mu[0, ids].tolist()
        assert support[1][0, :3].tolist() == log_pi[0, ids].tolist()
        found.append(NATS(*support).item())
    assert found == pytest.approx([reference.kl(merged(MU, [0, 1, 2]), merged(PI, [0, 1, 2]))] * 3, abs=ATOL)


def test_edge_6_rows_have_their_own_tokens():
    log_mu, log_pi, ids = logs(MU, MU[::-1]), logs(PI, PI), torch.tensor([[0, 1], [4, 3]])
    token = torch.tensor([4, 3])
    both = topk_support(token, log_mu.gather(-1, token[:, None])[:, 0], ids, log_mu.gather(-1, ids), log_pi)
    first, second = ([x.exp()[i].tolist() for x in both] for i in range(2))
    assert first[0] == pytest.approx([0.4, 0.3, 0.05, 0.25], abs=ATOL)
    assert first[1] == pytest.approx([0.1, 0.3, 0.3, 0.3], abs=ATOL)
    assert second[0] == pytest.approx([0.4, 0.3, 0.0, 0.3], abs=ATOL)
    assert second[1] == pytest.approx([0.3, 0.1, 0.0, 0.6], abs=ATOL)


def test_edge_3_other_is_clamped_after_a_sum_above_one():
    over = logs([0.6, 0.4]) + 1e-6
    mu, pi = topk_support(torch.tensor([0]), over[:, 0], torch.tensor([[0, 1]]), over, over)
    assert mu[0, -1].item() == pi[0, -1].item() == pytest.approx(FLOOR, abs=ATOL)
    assert NATS(mu, pi).tolist() == TV(mu, pi).tolist() == [0.0]


def test_edge_11_vocabulary_padded_beyond_the_tokenizer():
    """Ids that no tokenizer has get a logit of -inf; a list as long as the vocabulary names them, too."""
    mu, pi = [*MU, 0.0, 0.0], [*PI, 0.0, 0.0]
    for k in (2, 5, 7):
        named = [*likeliest(MU, k), 3]
        support = topk(Pair(mu, pi, token=3), k)
        exact = merged(MU, named), merged(PI, named)
        assert TV(*support).item() == pytest.approx(reference.tv(*exact), abs=ATOL)
        assert NATS(*support).item() == pytest.approx(reference.kl(*exact), abs=ATOL)


def test_edge_11_mass_where_mu_has_none():
    # A truncated or padded mu reports log-probs of -inf; pi may still be there.
    support = topk(Pair([0.7, 0.3, 0.0], [0.5, 0.3, 0.2], token=0), k=3)
    assert TV(*support).item() == pytest.approx(0.2, abs=ATOL)
    assert NATS(*support).item() == pytest.approx(0.7 * math.log(0.7 / 0.5), abs=ATOL)


@PROPERTY
@given(pair=pairs(), k=st.integers(1, 8))
def test_topk_agrees_with_float64(pair: Pair, k: int):
    named = [*likeliest(pair.mu, k), pair.token]
    mu, pi = merged(pair.mu, named), merged(pair.pi, named)
    support = topk(pair, k)
    assert TV(*support).item() == pytest.approx(reference.tv(mu, pi), abs=ATOL)
    if len(set(named)) < len(pair.mu):
        assert NATS(*support).item() == pytest.approx(reference.kl(mu, pi), abs=kl_tolerance(mu, pi))


@PROPERTY
@given(pair=pairs())
def test_binary_agrees_with_float64(pair: Pair):
    mu, pi = merged(pair.mu, [pair.token]), merged(pair.pi, [pair.token])
    assert TV(*binary(pair)).item() == pytest.approx(abs(mu[0] - pi[0]), abs=ATOL)
    assert NATS(*binary(pair)).item() == pytest.approx(reference.kl(mu, pi), abs=kl_tolerance(mu, pi))


@PROPERTY
@given(pair=pairs())
def test_binary_then_topk_then_full(pair: Pair):
    """Naming more outcomes never loses divergence; from K = V on it is the exact one."""
    size = len(pair.mu)
    supports = [binary(pair), *(topk(pair, k) for k in range(1, size + 1)), pair.logs]
    slack = [kl_tolerance(*(x.double().exp()[0].tolist() for x in support)) for support in supports]
    for divergence, tolerance in ((TV, [ATOL] * len(supports)), (NATS, slack)):
        ladder = [divergence(*support).item() for support in supports]
        assert all(ladder[i] <= ladder[i + 1] + tolerance[i] for i in range(size + 1))
        assert ladder[size] == pytest.approx(ladder[size + 1], abs=2e-6)


def test_edge_11_k_of_one():
    log_mu, log_pi = logs(MU), logs(PI)
    inside = topk_support(torch.tensor([0]), log_mu[:, 0], torch.tensor([[0]]), log_mu[:, :1], log_pi)
    assert TV(*inside).item() == pytest.approx(0.3, abs=ATOL)
    outside = topk_support(torch.tensor([4]), log_mu[:, 4], torch.tensor([[0]]), log_mu[:, :1], log_pi)
    assert TV(*outside).item() == pytest.approx(0.5 * (0.3 + 0.25 + 0.05), abs=ATOL)


@PROPERTY
@given(pair=pairs(spread=20.0), k=st.integers(1, 8))
def test_edge_1_equal_bits_are_no_divergence_and_mask_nothing(pair: Pair, k: int):
    same = Pair(pair.mu, pair.mu, pair.token)
    for support in (binary(same), topk(same, k), same.logs):
        for divergence in (TV, NATS):
            assert divergence(*support).tolist() == [0.0]
    logp = same.logs[0][:, same.token]
    for advantage in (-1.0, 0.0, 1.0):
        assert trust_mask(torch.tensor([advantage]), logp, logp.clone(), torch.zeros(1), 0.0, 0.0).all()


class FixedHead:
    """Gives the log-probs of MU whatever the hidden states."""

    def log_probs(self, hidden_NH: Tensor) -> Tensor:
        return logs(MU).expand(len(hidden_NH), -1)


@pytest.mark.parametrize(
    ("approx", "named", "num_logprobs"),
    [(Binary(), [3], 0), (TopK(2), [0, 1, 3], 2), (Full(), [0, 1, 2, 3, 4], WHOLE_VOCABULARY)],
)
def test_each_choice_takes_what_it_asked_the_engine_for(approx, named, num_logprobs):
    log_mu, log_pi, token = logs(MU), logs(PI), torch.tensor([3])
    reports = {
        0: PolicyReport(log_mu[:, 3]),
        2: PolicyReport(log_mu[:, 3], torch.tensor([[0, 1]]), log_mu[:, :2]),
        WHOLE_VOCABULARY: PolicyReport(log_mu[:, 3], hidden_NH=torch.zeros(1, 2), head=FixedHead()),
    }
    assert approx.num_logprobs == num_logprobs
    support = approx.support(reports[num_logprobs], token, log_pi[:, 3], log_pi)
    mu, pi = merged(MU, named), merged(PI, named)
    assert TV(*support).item() == pytest.approx(reference.tv(mu, pi), abs=ATOL)
    assert NATS(*support).item() == pytest.approx(reference.kl(mu, pi), abs=ATOL)


def test_a_list_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"approx.k=0 .* approx=binary"):
        TopK(0)
    assert TopK(1).num_logprobs == 1
