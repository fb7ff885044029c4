"""A small Hugging Face hub on this machine, which takes what huggingface_hub's client uploads."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a1B2" * 8


class Hub(ThreadingHTTPServer):
    """`refuse`: the status that a path which ends so is answered with; /storage is where large files go."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refuse: dict[str, int] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.made: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        """What the commit put into the repository, by path."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.body())

    def do_PUT(self) -> None:
        self.server.uploaded[self.path.rpartition("/")[2]] = self.body()
        self.send(self.server.refuse.get("/storage", 200), {})

    def answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/api/agent-harnesses":
            # huggingface_hub asks for it now and then, without a token; it is about no repository.
            self.send(404, {"error": "not found"})
            return
        hub.asked.append(path)
        hub.tokens.add(self.headers["Authorization"])
        refused = next((status for end, status in hub.refuse.items() if path.endswith(end)), None)
        if refused is not None:
            self.send(refused, {"error": f"no, {self.headers['Authorization']}", "url": f"{hub.url}/me/mine"})
        elif path == "/api/whoami-v2":
            self.send(200, {"name": "me", "type": "user"})
        elif path == "/api/repos/create":
            hub.made.append(json.loads(body))
            self.send(200, {"url": f"{hub.url}/me/mine"})
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith((".safetensors", ".gguf")) else "regular") for name in files]
            self.send(200, {"files": [dict(path=p, uploadMode=m, shouldIgnore=False, oid=None) for p, m in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [{**o, "actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}"}}} for o in asked]
            self.send(200, {"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.uploaded[value["oid"]]
            self.send(200, {"commitUrl": f"{hub.url}/me/mine/commit/1", "commitOid": "1", "success": True})
        else:
            self.send(404, {"error": "not found"})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def send(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
