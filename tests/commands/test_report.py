"""`dppo report`: where it writes, what it serves, and what it refuses in a line."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import composed

from dppo_cli.cli.main import main
from dppo_cli.commands.report import ReportConfig
from dppo_cli.config.build import build
from dppo_cli.telemetry.report.page import Served
from dppo_cli.telemetry.report.serve import Pages, make_server

CONFIG = "steps: 2\nrun_dir: null\n"
LINE = '{"step": 1, "reward": 0.5}\n'


@pytest.fixture
def run(work: Path) -> Path:
    folder = work / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text(LINE)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    return captured.err.removeprefix("dppo: ").strip()


def test_a_run_becomes_a_file(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run=run", "out=report.html"]) == 0
    assert "report.html" in capsys.readouterr().out
    html = (work / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n") and "not running: 1 of 2 steps" in html
    assert sorted(p.name for p in work.iterdir()) == ["report.html", "rewards.py", "run"]
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_a_file_that_is_there_is_replaced_only_if_asked(
    run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "report.html").write_text("mine")
    line = refused(capsys, "run=run", "out=report.html")
    assert line == "out=report.html exists already; name another file, or add overwrite=true"
    assert (work / "report.html").read_text() == "mine"
    assert main(["report", "run=run", "out=report.html", "overwrite=true"]) == 0
    assert (work / "report.html").stat().st_size > 10**6


def test_a_link_to_nowhere_is_there(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "loop").symlink_to("loop")
    assert refused(capsys, "run=run", "out=loop").startswith("out=loop exists already")
    assert (work / "loop").is_symlink()


def test_what_is_refused(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "sweep").mkdir()
    (work / "sweep/multirun.yaml").write_text("")
    (work / "empty").mkdir()
    cases = {
        (): "nothing to report; add run=runs/last, or sweep=FOLDER",
        ("run=run", "sweep=run"): "one of run=... and sweep=...",
        ("run=run",): "add out=report.html, or serve=true",
        ("run=run", "serve=true", "out=x.html"): "out=x.html is for a report in a file",
        ("run=nowhere", "out=x.html"): "run=nowhere is not a folder; name a run folder, such as runs/last",
        ("run=empty", "out=x.html"): "run=empty is not a run: it has no config.yaml",
        ("run=sweep", "out=x.html"): "run=sweep is a sweep; use sweep=sweep",
        ("sweep=run", "out=x.html"): "sweep=run is a run: use run=run",
        ("run=run", "out=run"): "out=run is a folder; name a file",
        ("run=run", "out=no/x.html"): "out=no/x.html cannot be written: there is no folder no",
        ("run=run", "serve=true", "port=70000"): "port=70000 breaks the rule 0 <= port <= 65535",
        ("run=run", "serve=true", "refresh=0"): "refresh=0.0 breaks the rule 1 <= refresh <= 3600",
    }
    for words, expected in cases.items():
        assert expected in refused(capsys, *words), words
    (run / "metrics.jsonl").write_text("no json\n" + LINE)
    assert "metrics.jsonl is damaged: line 1" in refused(capsys, "run=run", "out=x.html")


def test_without_plotly_it_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    line = refused(capsys, "run=run", "out=x.html")
    assert line == "dppo report draws with plotly, which is not installed; pip install 'dppo[report]'"


def test_a_port_that_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(capsys, "run=run", "serve=true", f"port={port}")
    assert line == f"port={port} cannot be used: Address already in use; choose another, or port=0 for any"


def test_it_loads_without_torch() -> None:
    code = "import sys, dppo_cli.commands.report; print('torch' in sys.modules, 'plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# serve=true


@pytest.fixture
def served(run: Path) -> Iterator[tuple[int, list[Served]]]:
    """A port, and what pages were made of."""
    made: list[Served] = []

    def make(page: Served) -> str:
        made.append(page)
        return f"page {len(made)}"

    server = make_server(Pages(run, make, 5.0), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield int(server.server_address[1]), made
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_page_is_made_anew_when_the_run_has_got_further(run: Path, served: tuple[int, list[Served]]) -> None:
    port, made = served
    assert [get(port, "/"), get(port, "/")] == [(200, "page 1")] * 2
    assert get(port, "/version") == (200, made[0].version)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward": 0.6}\n')
    assert get(port, "/version")[1] != made[0].version
    assert get(port, "/") == (200, "page 2") and made[1].version == get(port, "/version")[1]


def test_only_this_machine_and_only_the_page(served: tuple[int, list[Served]]) -> None:
    port, made = served
    assert get(port, "/../etc/passwd")[0] == get(port, "/metrics.jsonl")[0] == 404
    assert get(port, "/", host="evil.example")[0] == get(port, "/version", host=f"evil.example:{port}")[0] == 403
    assert made == []


def test_ctrl_c_ends_it(run: Path) -> None:
    command = [sys.executable, "-m", "dppo_cli", "report", "run=run", "serve=true", "port=0", "refresh=2"]
    # A shell has background jobs ignore Ctrl-C, and they hand that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        status, html = get(port, "/")
        assert status == 200 and "connect-src 'self'" in html
        data = json.loads(html.split('id="data">')[1].split("</script>")[0])
        assert data["served"] == {"refresh": 2.0, "version": get(port, "/version")[1]}
    finally:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_every_key_reaches_the_config() -> None:
    """Its own field and no other; `run` and `sweep` exclude each other, and so do `out` and `serve`."""

    def built(*words: str) -> ReportConfig:
        return build(ReportConfig, composed("report", *words))

    assert built("run=r", "out=x", "overwrite=true") == ReportConfig("r", None, "x", True, False, 8765, 5.0)
    assert built("sweep=s", "serve=true", "port=80", "refresh=1.5") == ReportConfig(
        None, "s", None, False, True, 80, 1.5
    )
