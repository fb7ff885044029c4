"""One process, and what a launcher's environment says of several."""

import pytest
import torch
from crews import worlds

from dppo_cli.errors import ConfigError
from dppo_cli.world import VARIABLES, World


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _ in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_main_one_and_sums_nothing() -> None:
    value = torch.tensor([1.0, 2.0])
    with World.launched("cpu") as world:
        world.sum([value])
        assert world == World() and world.is_main and value.tolist() == [1.0, 2.0]
        assert world.broadcast("something") == "something"
    assert not World(rank=1, size=2).is_main


def test_a_launcher_that_started_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with World.launched("cpu") as world:
        assert world == World()


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"WORLD_SIZE": "two"}, "^WORLD_SIZE=two in the environment is no number of processes"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE=0 in the environment is no number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "^RANK=-1 in the environment is no number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "^RANK=2 in the environment is not less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}, "^the environment .* MASTER_ADDR expected, but not"),
    ],
)
def test_an_environment_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, environment, why: str) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=f"{why}.*; if no launcher has started this process, unset"),
        World.launched("cpu"),
    ):
        pytest.fail("it has been used")


def test_others_that_do_not_come_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def joined(self: World, *given: object, check) -> World:
        for _ in range(3):
            check()
        return World()

    monkeypatch.setattr(World, "joined", joined)
    monkeypatch.setattr("dppo_cli.world.PATIENCE", -1.0)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "1"), ("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with World.launched("cpu", told.append):
        (text,) = told
    assert text.startswith("process 2 of 4 is waiting for the others, at node7:29500; if no launcher")


def test_a_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be seen without one."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **more: calls.append((given, more)))
    world = World(5, 8)
    assert world.joined("cuda", 5) is world
    more = {"store": None, "rank": 5, "world_size": 8, "device_id": torch.device("cuda", 1)}
    assert calls == ["cuda:1", (("cpu:gloo,cuda:nccl",), more)]


def test_threads_that_sum_as_processes_do() -> None:
    """What other tests use in place of processes."""
    from threading import Thread

    found = {}

    def run(world: World) -> None:
        values = [torch.tensor([1.0 + world.rank]), torch.tensor(10.0)]
        world.sum(values)
        found[world.rank] = [value.tolist() for value in values]

    threads = [Thread(target=run, args=(world,)) for world in worlds(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {rank: [[6.0], 30.0] for rank in range(3)}
