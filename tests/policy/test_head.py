"""The head in chunks: log-probs, entropies and gradients against autograd in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from dppo_cli.policy.head import Head, masses, token_log_probs

N, H, V = 7, 8, 53
EVERY_CHUNK = pytest.mark.parametrize("chunk_size", [1, 3, N, N + 5])
# Logits are sums of H float32 products of size <= 2, so they err by a few 1e-7; log-probs and slopes inherit that.
ATOL = 1e-6


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS, HIDDEN = normal(V, H, seed=0, scale=0.7), normal(V, seed=1), normal(N, H, seed=2)
FORBIDDING = BIAS.clone()
FORBIDDING[[4, 17, V - 1]] = -torch.inf
TOKEN = torch.tensor([0, 51, 7, 7, 20, 33, 5])
COTANGENT = normal(N, seed=3)

HEADS = {
    "plain": Head(WEIGHT),
    "temperature": Head(WEIGHT, temperature=0.6),
    "scale": Head(WEIGHT, scale=0.25),
    "bias": Head(WEIGHT, BIAS),
    "softcap": Head(WEIGHT, softcap=1.5),
    "forbidden": Head(WEIGHT, FORBIDDING),
    "all": Head(WEIGHT, BIAS, scale=0.8, softcap=2.0, temperature=1.7),
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def naive_log_probs(head: Head, hidden_NH: Tensor) -> Tensor:
    """log softmax in float64 of what the model's own code would compute."""
    z_NV = hidden_NH.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        z_NV = z_NV + head.bias_V.double()
    z_NV = z_NV * head.scale
    if head.softcap is not None:
        z_NV = torch.tanh(z_NV / head.softcap) * head.softcap
    return torch.log_softmax(z_NV / head.temperature, dim=-1)


def naive(head: Head, hidden_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of TOKEN, entropies, and the gradient of COTANGENT . log-probs, float64."""
    hidden_NH = hidden_NH.detach().double().requires_grad_()
    log_pi_NV = naive_log_probs(head, hidden_NH)
    logp_N = log_pi_NV.gather(-1, TOKEN[:, None]).squeeze(-1)
    (slope_NH,) = torch.autograd.grad((logp_N * COTANGENT.double()).sum(), hidden_NH)
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in log_pi_NV.exp().tolist()]
    return logp_N.detach(), torch.tensor(entropy, dtype=torch.float64), slope_NH


def ours(head: Head, hidden_NH: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH = hidden_NH.detach().requires_grad_()
    logp_N, entropy_N = token_log_probs(head, hidden_NH, TOKEN, chunk_size)
    assert logp_N.dtype == entropy_N.dtype == torch.float32
    (slope_NH,) = torch.autograd.grad((logp_N * COTANGENT).sum(), hidden_NH)
    return logp_N.detach(), entropy_N, slope_NH


@EVERY_HEAD
@EVERY_CHUNK
def test_log_probs_entropy_and_gradient_agree_with_autograd(head, chunk_size):
    for found, expected in zip(ours(head, HIDDEN, chunk_size), naive(head, HIDDEN), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=ATOL, rtol=ATOL)


@EVERY_HEAD
def test_whole_distribution_agrees_and_sums_to_one(head):
    log_pi_NV = head.log_probs(HIDDEN)
    torch.testing.assert_close(log_pi_NV.double(), naive_log_probs(head, HIDDEN), atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(log_pi_NV.exp().sum(-1), torch.ones(N), atol=ATOL, rtol=0)
    torch.testing.assert_close(head.logits(HIDDEN).log_softmax(-1), log_pi_NV, atol=ATOL, rtol=ATOL)
    assert torch.equal(head.tempered(head.product(HIDDEN)), head.logits(HIDDEN))


@EVERY_HEAD
def test_masses_are_probabilities_up_to_a_factor(head):
    out_NV = torch.empty(N, V)
    shifted_NV, mass_NV, total_N1 = masses(head.logits(HIDDEN), out_NV)
    assert mass_NV.data_ptr() == out_NV.data_ptr()
    expected_NV = naive_log_probs(head, HIDDEN)
    torch.testing.assert_close((shifted_NV - total_N1.log()).double(), expected_NV, atol=ATOL, rtol=ATOL)
    torch.testing.assert_close((mass_NV / total_N1).double(), expected_NV.exp(), atol=ATOL, rtol=ATOL)


def test_edge_4_log_probs_are_of_the_tempered_distribution():
    raw_NV = HIDDEN @ WEIGHT.T
    for temperature in (0.5, 2.0):
        found_N, _, _ = ours(Head(WEIGHT).at(temperature), HIDDEN, 3)
        expected_NV = (raw_NV / temperature).log_softmax(-1)
        torch.testing.assert_close(found_N, expected_NV.gather(-1, TOKEN[:, None])[:, 0], atol=ATOL, rtol=ATOL)


def test_another_temperature_changes_nothing_else():
    head = HEADS["all"]
    assert vars(head.at(0.3)) == {**vars(head), "temperature": 0.3}
    assert head.temperature == 1.7


@EVERY_HEAD
@EVERY_CHUNK
def test_visitor_sees_each_row_once_with_the_finished_log_probs(head, chunk_size):
    seen_NV, times_N = torch.full((N, V), torch.nan), torch.zeros(N)

    def visit(rows: slice, log_pi_CV: Tensor) -> None:
        assert len(log_pi_CV) == rows.stop - rows.start <= chunk_size
        assert log_pi_CV.dtype == torch.float32 and not torch.is_grad_enabled()
        seen_NV[rows] = log_pi_CV
        times_N[rows] += 1

    hidden_NH = HIDDEN.clone().requires_grad_()
    logp_N, _ = token_log_probs(head, hidden_NH, TOKEN, chunk_size, visit)
    assert times_N.tolist() == [1.0] * N
    torch.testing.assert_close(seen_NV.double(), naive_log_probs(head, HIDDEN), atol=ATOL, rtol=ATOL)
    assert torch.equal(seen_NV.gather(-1, TOKEN[:, None])[:, 0], logp_N)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation put out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_nothing_as_large_as_tokens_by_vocabulary_exists(head):
    many, chunk_size = 100, 4
    hidden_NH, token_N = normal(many, H, seed=4).requires_grad_(), torch.arange(many) % V
    with LargestTensor() as largest:
        logp_N, _ = token_log_probs(head, hidden_NH, token_N, chunk_size)
        logp_N.sum().backward()
    # One chunk of logits is 212 numbers, the hidden states are 800, the weights 424; all logits would be 5300.
    assert largest.numel == many * H


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_only_one_row_of_hidden_size_per_token_waits_for_the_backward_pass(head):
    shapes = []
    with saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        token_log_probs(head, HIDDEN.clone().requires_grad_(), TOKEN, 3)
    assert shapes == [(N, H)]


def test_only_the_log_prob_carries_gradient():
    logp_N, entropy_N = token_log_probs(HEADS["plain"], HIDDEN.clone().requires_grad_(), TOKEN, 3)
    assert logp_N.requires_grad and not entropy_N.requires_grad
    logp_N, entropy_N = token_log_probs(HEADS["plain"], HIDDEN, TOKEN, 3)
    assert not logp_N.requires_grad and not entropy_N.requires_grad


def test_no_tokens():
    hidden_0H = torch.zeros(0, H, requires_grad=True)
    logp_0, entropy_0 = token_log_probs(HEADS["plain"], hidden_0H, torch.zeros(0, dtype=torch.int64), 3)
    assert logp_0.shape == entropy_0.shape == (0,)
    (slope_0H,) = torch.autograd.grad(logp_0.sum(), hidden_0H)
    assert slope_0H.shape == (0, H)


def test_edge_3_forbidden_token():
    """A logit of -inf: log-prob -inf where it is asked for, and neither entropy nor gradient notices."""
    token_N = torch.full_like(TOKEN, 4)
    hidden_NH = HIDDEN.clone().requires_grad_()
    logp_N, entropy_N = token_log_probs(HEADS["forbidden"], hidden_NH, token_N, 3)
    assert logp_N.tolist() == [-math.inf] * N
    torch.testing.assert_close(entropy_N.double(), naive(HEADS["forbidden"], HIDDEN)[1], atol=ATOL, rtol=ATOL)
    (slope_NH,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
    expected_NH = WEIGHT[4].double() - naive_log_probs(HEADS["forbidden"], HIDDEN).exp() @ WEIGHT.double()
    torch.testing.assert_close(slope_NH.double(), expected_NH, atol=ATOL, rtol=ATOL)


def test_edge_2_certain_token():
    """Probability exactly 1: log-prob, entropy and gradient are exactly 0."""
    weight_VH = torch.zeros(V, H)
    weight_VH[9, 0] = 200.0
    hidden_NH = torch.ones(2, H, requires_grad=True)
    logp_N, entropy_N = token_log_probs(Head(weight_VH), hidden_NH, torch.tensor([9, 9]), 3)
    (slope_NH,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
    assert logp_N.abs().max() == entropy_N.abs().max() == slope_NH.abs().max() == 0


def test_two_tokens_by_hand():
    # Logits (log 3, 0) at T = 1: pi = (3/4, 1/4). The slope of log pi(0) is (W0 - 3/4 W0 - 1/4 W1).
    weight_VH = torch.tensor([[math.log(3), 2.0], [0.0, 4.0]])
    hidden_NH = torch.tensor([[1.0, 0.0]], requires_grad=True)
    logp_N, entropy_N = token_log_probs(Head(weight_VH), hidden_NH, torch.tensor([0]), 1)
    (slope_NH,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
    assert logp_N.tolist() == pytest.approx([math.log(0.75)], abs=ATOL)
    assert entropy_N.tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)], abs=ATOL)
    assert slope_NH[0].tolist() == pytest.approx([math.log(3) / 4, -0.5], abs=ATOL)


# Low precision


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
@pytest.mark.parametrize("name", ["plain", "temperature", "scale", "bias", "softcap"])
def test_low_precision_weights(dtype, unit, name):
    head = HEADS[name]
    head = replace(head, weight_VH=WEIGHT.to(dtype), bias_V=None if head.bias_V is None else head.bias_V.to(dtype))
    found = ours(head, HIDDEN.to(dtype), 3)
    expected = naive(head, HIDDEN.to(dtype))
    # The layer's output W h + b is rounded once more: by `unit` of a logit, at most 7 here, then divided by T.
    error = 7 * unit / min(1.0, head.temperature)
    torch.testing.assert_close(found[0].double(), expected[0], atol=2 * error, rtol=0)
    torch.testing.assert_close(found[1].double(), expected[1], atol=4 * error, rtol=0)
    # A slope is at most |cotangent| * |W| / T in size; probabilities are off by `error` of themselves.
    torch.testing.assert_close(found[2].double(), expected[2], atol=4 * error, rtol=4 * unit)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
@pytest.mark.parametrize("rest", [0.1, 1e-2, 1e-3])
def test_edge_2_gradient_of_a_confident_token_keeps_its_digits(dtype, unit, rest):
    """1 - pi(a) is formed in float32: bfloat16 would take pi = 0.999 for 1, and the gradient would be noise."""
    weight_VH = torch.tensor([[1.0, 0.5, -0.25], [0.0, 1.0, 1.0]], dtype=dtype)
    hidden_NH = torch.tensor([[-math.log(rest), 0.0, 0.0]], dtype=dtype, requires_grad=True)
    logp_N, _ = token_log_probs(Head(weight_VH), hidden_NH, torch.tensor([0]), 1)
    (slope_NH,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
    # The logits here are the first column of W times h, without rounding.
    complement = 1 - torch.sigmoid(hidden_NH[0, 0].detach().double()).item()
    expected = [complement * (a - b) for a, b in ((1.0, 0.0), (0.5, 1.0), (-0.25, 1.0))]
    assert slope_NH.dtype == dtype
    # Rounded as 1 - pi, as a sum and as a product.
    assert slope_NH[0].tolist() == pytest.approx(expected, rel=3 * unit)


def test_hidden_states_of_higher_precision_than_the_weights():
    head = Head(WEIGHT.bfloat16())
    found, expected = ours(head, HIDDEN, 3), ours(head, HIDDEN.bfloat16(), 3)
    assert torch.equal(found[0], expected[0]) and found[2].dtype == torch.float32
    torch.testing.assert_close(found[2], expected[2].float(), atol=0, rtol=2.0**-7)
