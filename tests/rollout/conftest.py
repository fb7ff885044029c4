"""What tests of sampling share as fixtures."""

from collections.abc import Iterator
from pathlib import Path

import make
import pytest
import vllm_server
from refills import several_ends
from vllm_server import VLLM

from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import vllm_http, vllm_servers


@pytest.fixture
def policy(train_config) -> Policy:
    """Of a tiny Llama, with five tokens that end a response, so that lengths differ."""
    return several_ends(make.policy(train_config(), adapter_scale=0.1))


@pytest.fixture
def adapted(train_config) -> Policy:
    """The same with one end and an adapter that has more effect: what a server has to have loaded."""
    return make.policy(train_config(), adapter_scale=0.3)


@pytest.fixture
def server(model: Path) -> Iterator[VLLM]:
    with vllm_server.serving(model) as found:
        yield found


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts at servers that do not answer."""
    for module in (vllm_http, vllm_servers):
        monkeypatch.setattr(module, "PAUSE", 0.02)
