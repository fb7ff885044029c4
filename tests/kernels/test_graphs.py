"""When a function is called, recorded and replayed. CUDA itself is in tests/gpu/test_gpu_decode.py."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import make
import pytest
import torch

from dppo_cli.kernels import graphs
from dppo_cli.kernels.graphs import Graphs


class FakeCuda:
    """What `Graphs` uses of torch.cuda. `log`: what happened, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.error: Exception | None = None
        cuda = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                cuda.log.append("wait")

        class Graph:
            def pool(self) -> str:
                return "pool of the first"

            def replay(self) -> None:
                cuda.log.append("replay")

            def reset(self) -> None:
                cuda.log.append("reset")

        @contextmanager
        def stream(of: Any) -> Iterator[None]:
            cuda.log.append("on the side")
            yield

        @contextmanager
        def graph(into: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert not gc.isenabled() and not torch.is_autocast_cache_enabled()
            cuda.log.append(("record", pool, capture_error_mode))
            yield
            if cuda.error is not None:
                raise cuda.error

        main = Stream()
        for name, fake in {"Stream": lambda _: Stream(), "CUDAGraph": Graph, "stream": stream, "graph": graph}.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch.cuda, "current_stream", lambda: main)
        patch.setattr(graphs, "empty_cache", lambda device: cuda.log.append("empty"))

    def since(self) -> list[Any]:
        found, self.log[:] = list(self.log), []
        return found


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_on_a_cpu_it_calls_the_function():
    calls: list[int] = []
    made = Graphs(torch.device("cpu"), make.fail)
    for _ in range(3):
        made("key", lambda: calls.append(1))
    made.release()
    assert len(calls) == 3


def test_the_first_call_runs_and_records_and_the_others_replay(cuda):
    made = Graphs(torch.device("cuda"), make.fail)

    def step() -> None:
        cuda.log.append("step")

    run = ["wait", "on the side", "step", "wait"]
    made(1, step)
    assert cuda.since() == [*run, ("record", None, "thread_local"), "step"]
    made(1, step)
    assert cuda.since() == ["replay"]
    made(2, step)
    assert cuda.since() == [*run, ("record", "pool of the first", "thread_local"), "step"]
    assert gc.isenabled() and torch.is_autocast_cache_enabled()
    made.release()
    assert cuda.since() == ["reset", "reset", "empty"]
    made.release()
    assert cuda.since() == []
    made(1, step)
    assert ("record", None, "thread_local") in cuda.since()


def test_where_recording_fails_it_says_so_once_and_calls(cuda):
    warnings: list[str] = []
    made = Graphs(torch.device("cuda"), warnings.append)
    cuda.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    calls: list[int] = []
    for _ in range(3):
        made("key", lambda: calls.append(1))
    # Once for real, once to be recorded, and twice more.
    assert len(calls) == 4 and gc.isenabled() and torch.is_autocast_cache_enabled()
    assert warnings == [
        "sampling steps could not be recorded as CUDA graphs (operation not permitted when stream is capturing), so "
        "each kernel is launched by itself: slower"
    ]


def test_no_memory_is_no_reason_to_go_on(cuda):
    made = Graphs(torch.device("cuda"), make.fail)
    cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        made("key", lambda: None)
    assert gc.isenabled()
