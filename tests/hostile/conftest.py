"""What the hostile tests share: processes that fork, a run to break, and how many cases there are.

Of each test there is a short version, which is part of the ordinary tests, and a long one: `make test-hostile`, with
HOSTILE_CASES command lines (10,000 unless set) and a tenth as many data files and broken runs. They are numbered from
HOSTILE_SEED (0) on, so HOSTILE_CASES=1 HOSTILE_SEED=593 runs the command line 593 alone.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import broken
import pytest
from cases import Server

SERVERS = 8
"""At most; each has half a GiB of libraries in memory."""
MANY = int(os.environ.get("HOSTILE_CASES", "10000"))
SEED = int(os.environ.get("HOSTILE_SEED", "0"))


@pytest.fixture(scope="session")
def servers() -> Iterator[list[Server]]:
    made = [Server() for _ in range(min(SERVERS, os.cpu_count() or 1))]
    yield made
    for server in made:
        server.close()


@pytest.fixture(scope="session")
def prepared(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.prepare(tmp_path_factory.mktemp("runs"), servers[0])


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.hostile)])
def seeds(request: pytest.FixtureRequest) -> Callable[[int, int], range]:
    """`seeds(few, share)`: those of the cases: a few, or that share of many."""

    def of(few: int, share: int = 1) -> range:
        return range(SEED, SEED + (few if request.param == "short" else max(1, MANY // share)))

    return of
