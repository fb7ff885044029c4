"""Running each prompt once for all its responses, against a forward pass over every whole sequence."""

import make
import pytest
import tiny
import torch

from dppo_cli.policy.policy import Policy
from dppo_cli.types import Batch


def batch_of(policy: Policy, texts: tuple[str, ...], lengths: tuple[int, ...]) -> Batch:
    """Three responses of random tokens to each prompt, in mixed order."""
    generator = torch.Generator().manual_seed(0)
    completions = []
    for i, length in enumerate(lengths):
        prompt = make.prompts(policy, texts)[i % len(texts)]
        ids = torch.randint(3, 70, (length,), generator=generator).tolist()
        completions.append(make.completion(ids, prompt_ids=prompt.token_ids))
    return Batch.pack(make.samples(completions, [1.0] * len(completions)), policy.pad_id, policy.device)


def states_and_gradient(policy: Policy, states_NH: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    direction_NH = torch.randn(states_NH.shape, generator=torch.Generator().manual_seed(1))
    return states_NH.detach(), list(torch.autograd.grad((states_NH * direction_NH).sum(), policy.parameters))


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize("texts", [make.MIXED, ("3+4=", "a - ")], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("lengths", [(7, 1, 20, 4, 9, 2, 1, 12, 3, 5, 16, 2), (1,) * 8], ids=["mixed", "one token"])
def test_states_and_gradients_are_those_of_whole_sequences(train_config, architecture, texts, lengths):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    batch = batch_of(policy, texts, lengths)
    shared, shared_gradient = states_and_gradient(policy, policy.predicting_states(batch))
    start_N = batch.prompts.length_P1[batch.prompt_B[batch.row_N], 0]
    whole_BLH = policy.hidden_states(batch.whole_ids(policy.pad_id))
    whole, gradient = states_and_gradient(policy, whole_BLH[batch.row_N, start_N + batch.place_N - 1])
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=2e-5)
    for found, expected in zip(shared_gradient, gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() > 1e-3
