"""A server that stands for a judge, and the option that asks it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import make
from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.reward.judge import Judge
from dppo_cli.types import Score

Reply = tuple[int, dict[str, str], Any]


def said(text: str, tokens: int = 10) -> Reply:
    return 200, {}, {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": tokens}}


@dataclass
class Server:
    """`reply(body, number)` answers the request of that number, from 0."""

    reply: Callable[[dict[str, Any], int], Reply] = lambda body, number: said("Verdict: yes")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def served() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            status, headers, content = state.reply(body, number)
            with state.lock:
                state.at_once -= 1
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # The judge may have given up.
                self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def option(url: str, **changes: Any) -> Judge:
    """With the values of conf/reward/judge.yaml, but less waiting."""
    node = composed("train", "reward=judge", "reward.url=http://localhost/v1", "reward.model=judge-1").reward
    fields = {**OmegaConf.to_container(node), "url": url, "pause": 0.01, "timeout": 10.0, **changes}
    fields.pop("_target_")
    return Judge(**fields)


def scored(of: Judge, *texts: str, warn: Callable[[str], None] = make.fail) -> list[Score]:
    return of.load(warn)([make.prompt(7, answer="46")], [[make.completion(text=text) for text in texts]])[0]
