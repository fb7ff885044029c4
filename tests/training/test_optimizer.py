"""AdamW with moments in 8 bits: near the one with 32, and resumed in every bit."""

import pytest
import torch
from updates import assert_identical, off_policy, parameters

from dppo_cli.commands.assembly import make_learner
from dppo_cli.errors import ConfigError
from dppo_cli.training.optimizer import make_optimizer

# Matrices of 128 x 32 = 4,096 numbers are the smallest that bitsandbytes keeps in 8 bits.
LARGE = ("adapter.r=128", "adapter.alpha=128", "optim.lr=0.01", "optim.warmup_updates=0")


def after(config, updates):
    policy, groups = off_policy(config)
    learner = make_learner(policy, config)
    for _ in range(updates):
        learner.update(groups)
    return learner, groups


def test_eight_bits_stay_near_thirty_two(train_config):
    start = parameters(off_policy(train_config(*LARGE))[0])
    found, _ = after(train_config(*LARGE, "optim=adamw_8bit"), 3)
    exact, _ = after(train_config(*LARGE, "optim=adamw"), 3)
    moved = [a - b for a, b in zip(parameters(exact.policy), start, strict=True)]
    apart = [a - b for a, b in zip(parameters(found.policy), parameters(exact.policy), strict=True)]
    total, off = (torch.cat([t.flatten() for t in of]).norm() for of in (moved, apart))
    assert 0 < off < 0.2 * total


def test_its_moments_take_a_quarter(train_config):
    learner, _ = after(train_config(*LARGE, "optim=adamw_8bit"), 1)
    tensors, _ = learner.state()
    # Of a matrix: two moments of 4,096 bytes, 16 scales for each, two tables of 256 and the number of steps.
    name = next(n for n, p in learner.policy.model.named_parameters() if p.requires_grad and p.numel() == 4096)
    of = {key: value for key, value in tensors.items() if key.startswith("optimizer.") and key.endswith(name)}
    kinds = {key.split(".")[1]: (value.dtype, value.numel()) for key, value in of.items()}
    assert kinds["state1"] == kinds["state2"] == (torch.uint8, 4096)
    assert kinds["absmax1"] == kinds["absmax2"] == (torch.float32, 16)
    assert kinds["step"] == (torch.int64, 1)


def test_it_goes_on_from_its_state_in_every_bit(train_config):
    config = train_config(*LARGE, "optim=adamw_8bit", "optim.schedule=cosine")
    undisturbed, groups = after(config, 2)
    tensors, plain = undisturbed.state()
    kept = {name: value.clone() for name, value in tensors.items()}
    resumed, _ = after(config, 0)
    resumed.load_state(kept, plain)
    for learner in (undisturbed, resumed):
        learner.update(groups)
    assert_identical(parameters(resumed.policy), parameters(undisturbed.policy))
    assert_identical(list(resumed.state()[0].values()), list(undisturbed.state()[0].values()))
    assert not torch.equal(parameters(resumed.policy)[0], kept[next(iter(kept))])


def test_apples_gpu_is_refused(train_config):
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ConfigError, match=r"optim\.bits=8 needs bitsandbytes.*hardware\.device=mps; use optim=adamw"):
        make_optimizer(parameters, train_config("optim=adamw_8bit").optim, torch.device("mps"))
    assert isinstance(make_optimizer(parameters, train_config().optim, torch.device("mps")), torch.optim.AdamW)
