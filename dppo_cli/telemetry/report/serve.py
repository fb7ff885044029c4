"""The page of a run that goes on, on 127.0.0.1 only. It is made anew when a file of the run has changed."""

import http.server
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

from dppo_cli.errors import DppoError, RunError
from dppo_cli.telemetry.report.page import Served
from dppo_cli.training.lock import is_held

HOST = "127.0.0.1"
WATCHED = (
    "metrics.jsonl",
    "warnings.jsonl",
    "summary.json",
    "eval_before.json",
    "resumes.json",
    "masked_tokens.json",
    "job.json",
)


def version_of(folder: Path) -> str:
    """Another text whenever a run in `folder`, or in a folder in it, has got further, or has ended."""
    found = [str(is_held(folder))]
    for name in WATCHED:
        for path in sorted((folder / name, *folder.glob(f"*/{name}"))):
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append(f"{stat.st_mtime_ns}-{stat.st_size}")
    return "_".join(found)


class Pages:
    """The newest page. Threads of the server share it."""

    def __init__(self, folder: Path, make: Callable[[Served], str], refresh: float) -> None:
        self.folder, self.make, self.refresh = folder, make, refresh
        self.lock = threading.Lock()
        self.version, self.page = "", b""
        self.packed: dict[Hashable, tuple[str, int]] = {}

    def __call__(self) -> bytes:
        """Raises DppoError if the run cannot be read any more."""
        with self.lock:
            version = version_of(self.folder)
            if version != self.version or not self.page:
                self.page = self.make(Served(self.refresh, version, self.packed)).encode()
                self.version = version
            return self.page


def make_server(pages: Pages, port: int) -> http.server.ThreadingHTTPServer:
    """Raises RunError if the port is taken."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere may point a name of its own at this address, and read what it gets.
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (HOST, "localhost"):
                return self.answer(403, "text/plain", b"ask for http://127.0.0.1\n")
            if self.path == "/version":
                return self.answer(200, "text/plain", version_of(pages.folder).encode())
            if self.path != "/":
                return self.answer(404, "text/plain", b"there is only /\n")
            try:
                return self.answer(200, "text/html; charset=utf-8", pages())
            except DppoError as error:
                return self.answer(500, "text/plain; charset=utf-8", f"{error}\n".encode())

        def answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
            ):
                self.send_header(name, value)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: a line every few seconds would fill the terminal."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        # Another server on this port would else share it with us.
        allow_reuse_port = False

        def handle_error(self, request: object, client_address: object) -> None:
            """A browser that went away is no error."""

    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise RunError(f"port={port} cannot be used: {error.strerror}; choose another, or port=0 for any") from None


def serve(server: http.server.ThreadingHTTPServer) -> None:
    """Until Ctrl-C."""
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
