"""Messages between processes: what arrives is what was sent, and no more of it than that."""

import pickle
from multiprocessing import Pipe

import pytest
import torch

from dppo_cli.processes.line import Line
from dppo_cli.types import PolicyReport


@pytest.fixture
def ends() -> tuple[Line, Line]:
    first, second = Pipe()
    return Line(first), Line(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_arrive_as_they_were(ends: tuple[Line, Line], dtype: torch.dtype) -> None:
    sent = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=dtype)
    ends[0].send({"whole": sent, "column": sent[:, 1], "none": sent[:0], "scalar": sent[0, 1]})
    found = ends[1].receive()
    assert found["whole"].dtype == dtype and found["whole"].equal(sent)
    assert found["column"].equal(sent[:, 1]) and found["none"].shape == (0, 3) and found["scalar"].shape == ()


def test_a_tensor_can_be_changed_where_it_arrives(ends: tuple[Line, Line]) -> None:
    sent = torch.zeros(3)
    ends[0].send(sent)
    found = ends[1].receive()
    found += 1
    assert found.tolist() == [1, 1, 1] and sent.tolist() == [0, 0, 0]


def test_only_the_slice_is_sent(ends: tuple[Line, Line]) -> None:
    """Reports on single responses are cut from those of many."""
    report = PolicyReport(torch.randn(10_000))[4:6]
    ends[0].send(report)
    received = ends[1].connection.recv_bytes()
    assert len(received) < 1_000 < len(pickle.dumps(report)), "torch's own way sends all of the memory"
    assert pickle.loads(received).logp_N.equal(report.logp_N)


def test_gradients_do_not_travel(ends: tuple[Line, Line]) -> None:
    ends[0].send(torch.ones(2, requires_grad=True) * 2)
    found = ends[1].receive()
    assert found.tolist() == [2, 2] and not found.requires_grad


def test_whoever_waits_hears_that_the_other_end_is_closed(ends: tuple[Line, Line]) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()
    ends[1].send("anybody?")  # which a worker asks when the main process is gone: it hears of it when it listens
    assert ends[1].has_something()
    with pytest.raises((EOFError, OSError)):
        ends[1].receive()


def test_whoever_sends_does_not_wait_for_a_reader(ends: tuple[Line, Line]) -> None:
    """A process goes on sampling while the other is at work."""
    sent = [torch.full((300_000,), float(number)) for number in range(5)]
    for message in sent:
        ends[0].send(message)
        message += 1  # what was sent is as it was
    assert [float(ends[1].receive()[0]) for _ in sent] == [0, 1, 2, 3, 4]
    assert not ends[1].has_something()


def test_what_was_sent_is_read_after_the_end_is_closed(ends: tuple[Line, Line]) -> None:
    ends[0].send("last words")
    ends[0].close()
    assert ends[1].receive() == "last words"
