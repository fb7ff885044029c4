"""The term against a reference policy."""

import math

import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, same

from dppo_cli.algorithm.objective import kl_to_reference


@PROPERTY
@given(pair=reference.pairs(), shift=st.lists(st.floats(-2, 2), min_size=8, max_size=8))
def test_expected_gradient_is_that_of_the_exact_kl_to_the_reference(pair: reference.Pair, shift: list[float]):
    mu, ref = torch.tensor([pair.mu, pair.pi], dtype=torch.float64)
    logits = torch.tensor(shift[: len(mu)], dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(-1)
    (found,) = torch.autograd.grad((mu * kl_to_reference(log_pi, ref.log(), mu.log())).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref.log())).sum(), logits)
    same(found, expected)


def test_kl_to_reference_by_hand():
    logp_pi_N, logp_ref_N, logp_mu_N = (torch.tensor([p], dtype=torch.float64).log() for p in (0.4, 0.1, 0.2))
    logp_pi_N.requires_grad_()
    loss_N = kl_to_reference(logp_pi_N, logp_ref_N, logp_mu_N)
    same(loss_N.detach(), [math.log(4.0) ** 2])
    (found_N,) = torch.autograd.grad(loss_N.sum(), logp_pi_N)
    same(found_N, [2 * math.log(4.0)])
