"""Running what all prompts begin with once, against running every prompt by itself."""

import make
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MptConfig

from dppo_cli.policy.forward import WORTH_SHARING, run_prompts, shared_beginning
from dppo_cli.types import PaddedPrompts

PADDED = make.ALIKE
EVEN = tuple(make.BEGINNING + rest for rest in ("1+2=", "3+4=", "55-6"))
WITHOUT_WINDOW = ["llama3", "qwen3", "gpt2"]
ENOUGH = WORTH_SHARING


def padded(policy, texts) -> PaddedPrompts:
    return PaddedPrompts.pad([p.token_ids for p in make.prompts(policy, texts)], policy.pad_id, policy.device)


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize("texts", [PADDED, EVEN, make.MIXED], ids=["padded", "even", "nothing in common"])
@torch.no_grad()
def test_states_keys_and_values_are_those_of_each_prompt_alone(train_config, architecture, texts):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = padded(policy, texts)
    cache = DynamicCache()
    hidden_PH = run_prompts(policy.model, prompts, cache)
    close = dict(rtol=1e-5, atol=1e-5)
    for p, ids in enumerate(prompts.token_ids):
        alone = DynamicCache()
        expected = policy.model.base_model(input_ids=torch.tensor([ids]), past_key_values=alone, use_cache=True)
        torch.testing.assert_close(hidden_PH[p], expected.last_hidden_state[0, -1], **close)
        for layer, own in zip(cache.layers, alone.layers, strict=True):
            torch.testing.assert_close(layer.keys[p, :, -len(ids) :], own.keys[0], **close)
            torch.testing.assert_close(layer.values[p, :, -len(ids) :], own.values[0], **close)


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@torch.no_grad()
def test_the_beginning_runs_once(train_config, architecture):
    policy = make.policy(train_config(model=architecture))
    shapes = []
    hook = policy.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    run_prompts(policy.model, padded(policy, PADDED), DynamicCache())
    hook.remove()
    whole, beginning = len(PADDED[1]), len(make.BEGINNING)
    if architecture in WITHOUT_WINDOW:
        assert shapes == [(1, beginning), (4, whole - beginning)]
    else:
        assert shapes == [(4, whole)], "a window is measured in columns, which padding inside would change"


@torch.no_grad()
def test_a_model_that_measures_distance_in_columns_runs_whole_prompts():
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=96)
    model = AutoModelForCausalLM.from_config(config).eval()
    beginning = list(range(3, 50))
    token_ids = [[*beginning, 51], [*beginning, *range(52, 70)]]
    prompts = PaddedPrompts.pad(token_ids, 0, torch.device("cpu"))
    assert shared_beginning(model, prompts) == 0
    hidden_PH = run_prompts(model, prompts, DynamicCache())
    for hidden_H, ids in zip(hidden_PH, token_ids, strict=True):
        expected_H = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden_H, expected_H, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("token_ids", "common"),
    [
        ([range(ENOUGH + 1), [*range(ENOUGH), 99]], ENOUGH),
        # One too few for two prompts, but not for three.
        ([range(ENOUGH), [*range(ENOUGH - 1), 99]], 0),
        ([range(ENOUGH), [*range(ENOUGH - 1), 99], range(ENOUGH + 5)], ENOUGH - 1),
        # The shorter one keeps a token of its own.
        ([range(ENOUGH + 1), range(ENOUGH + 9)], ENOUGH),
        ([range(100)], 0),
        ([range(1, 100), range(100)], 0),
    ],
)
def test_how_much_is_shared(train_config, token_ids, common):
    policy = make.policy(train_config())
    prompts = PaddedPrompts.pad([list(ids) for ids in token_ids], policy.pad_id, policy.device)
    assert shared_beginning(policy.model, prompts) == common


@pytest.mark.parametrize("architecture", WITHOUT_WINDOW)
@pytest.mark.parametrize("texts", [PADDED, EVEN], ids=["padded", "even"])
def test_gradients_are_those_of_each_prompt_alone(train_config, architecture, texts):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = padded(policy, texts)

    def gradient(found: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Of a random direction in all that later tokens see of each prompt."""
        generator = torch.Generator().manual_seed(0)
        total = sum((state * torch.randn(state.shape, generator=generator)).sum() for each in found for state in each)
        total.backward()
        gradients = [p.grad.clone() for p in policy.parameters]
        policy.model.zero_grad()
        return gradients

    cache = DynamicCache()
    hidden_PH = run_prompts(policy.model, prompts, cache)
    ours, alone = [], []
    for p, ids in enumerate(prompts.token_ids):
        ours.append([hidden_PH[p], *(s[p, :, -len(ids) :] for x in cache.layers for s in (x.keys, x.values))])
        own = DynamicCache()
        hidden = policy.model.base_model(input_ids=torch.tensor([ids]), past_key_values=own, use_cache=True)
        alone.append([hidden.last_hidden_state[0, -1], *(s[0] for x in own.layers for s in (x.keys, x.values))])
    for found, expected in zip(gradient(ours), gradient(alone), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
