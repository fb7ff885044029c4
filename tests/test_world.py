"""One process and several: sums, and an update that several processes share."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import composed
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dppo_cli.errors import ConfigError
from dppo_cli.world import World

SCRIPT = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import make
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.commands.train import make_learner
from dppo_cli.config.build import build
from dppo_cli.rollout.engine import in_order
from dppo_cli.world import World

out, config = Path(sys.argv[2]), build(TrainConfig, OmegaConf.load(sys.argv[3]))
torch.set_num_threads(1)
world = World.current()
assert float(world.sum(torch.tensor(world.rank + 1.0))) == (3.0 if world.size == 2 else 1.0)
policy = make.policy(config, adapter_scale=0.1)
prompts = make.prompts(policy)
with config.rollout.load(policy, make.fail) as engine:
    engine.sync(0)
    sampled = in_order(engine.generate(prompts, 2, config.sampling, 0, seed=1))
    groups = make.groups(prompts, sampled, [1.0, -1.0, 0.0, 0.0] * 2)
if world.is_main:
    save_file({str(i): p.detach() for i, p in enumerate(policy.parameters)}, out / "start.safetensors")
share = groups[world.rank :: world.size]
result = make_learner(policy, config, world).update(share)
if world.is_main:
    save_file({str(i): p.detach() for i, p in enumerate(policy.parameters)}, out / f"{world.size}.safetensors")
"""


def test_one_process_is_the_main_one_and_sums_nothing() -> None:
    world = World()
    value = torch.tensor([1.0, 2.0])
    assert world.is_main and world.sum(value) is value
    assert not World(rank=1, size=2).is_main


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_train_what_one_trains(train_config, tmp_path: Path) -> None:
    """Each has some of the groups (one only such without advantage); gradient and divisor are those of all groups."""
    config = train_config()
    words = ["model=hf", f"model.path={config.model.path}", "hardware=cpu", "batch=small", "adapter.r=4"]
    node = composed("train", *words, "sampling.max_new_tokens=8", "optim.lr=0.01", "optim=adamw_small")
    OmegaConf.save(node, tmp_path / "config.yaml", resolve=True)
    (tmp_path / "share.py").write_text(SCRIPT)
    tests = str(Path(__file__).parent)
    alone = [sys.executable, "share.py", tests, str(tmp_path), "config.yaml"]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *alone[1:]]
    for command in (alone, both):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / f"{size}.safetensors") for size in (1, 2))
    start = load_file(tmp_path / "start.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)


def test_an_environment_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_cli.world.PartialState", lambda **_: torch.device("nonsense"))
    with pytest.raises(ConfigError, match=r"the environment .* cannot be used: Expected one of cpu, cuda"):
        World.current()
