"""What tests of rewards share as fixtures."""

from collections.abc import Iterator

import pytest
from judges import Server, served


@pytest.fixture
def server() -> Iterator[Server]:
    with served() as running:
        yield running
