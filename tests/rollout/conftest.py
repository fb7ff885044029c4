"""What tests of sampling share as fixtures."""

import make
import pytest
from refills import several_ends

from dppo_cli.policy.policy import Policy


@pytest.fixture
def policy(train_config) -> Policy:
    """Of a tiny Llama, with five tokens that end a response, so that lengths differ."""
    return several_ends(make.policy(train_config(), adapter_scale=0.1))
