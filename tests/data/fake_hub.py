"""A Hugging Face hub for tests: a local server of the few addresses that `datasets` asks, and of nothing else."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets.config
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow.parquet import write_table

COMMIT = hashlib.sha1(b"the only commit").hexdigest()
Rows = list[dict[str, object]]


def add_set(root: Path, name: str, configs: dict[str, dict[str, Rows]]) -> None:
    """Write a data set as the hub keeps it: Parquet files, and a card that says which file is which split."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = f"{config}/{split}-00000-of-00001.parquet"
            card += [f"  - split: {split}", f"    path: {path}"]
            (root / name / config).mkdir(parents=True, exist_ok=True)
            write_table(pyarrow.Table.from_pylist(rows), root / name / path)
    (root / name / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


@contextmanager
def serving(root: Path, gated: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a hub with the sets below `root`; `gated` ones are refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            kind, _, rest = path.removeprefix("/").partition("datasets/")
            parts = rest.split("/")
            name, action, revision = "/".join(parts[:2]), (parts[2:3] or [""])[0], (parts[3:4] or ["main"])[0]
            folder, below = root / name, "/".join(parts[4:])
            if name in gated and action == "resolve":
                self.answer(401, error="GatedRepo")
            elif not (folder / "README.md").is_file():
                self.answer(401, error="RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.answer(404, error="RevisionNotFound")
            elif kind == "" and action == "resolve":
                file = folder / below
                self.answer(200, file.read_bytes()) if file.is_file() else self.answer(404, error="EntryNotFound")
            elif kind == "api/" and action == "tree":
                files = [f for f in sorted((folder / below).rglob("*")) if f.is_file()]
                self.answer(200, json.dumps([entry(folder, f) for f in files]).encode())
            elif kind == "api/" and action in ("", "revision"):
                siblings = [{"rfilename": str(f.relative_to(folder))} for f in folder.rglob("*") if f.is_file()]
                about = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self.answer(200, json.dumps(about).encode())
            else:
                self.answer(404, error="EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            folder = root / "/".join(urlsplit(self.path).path.split("/")[3:5])
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            found = [folder / path for path in asked if (folder / path).is_file()]
            self.answer(200, json.dumps([entry(folder, file) for file in found]).encode())

        def answer(self, status: int, content: bytes = b"", error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(folder: Path, file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }


def use(patch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Have the libraries ask the hub at `address` and keep what they get below `cache`."""
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(datasets.config, "HF_ENDPOINT", address)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    offline(patch, False)


def offline(patch: pytest.MonkeyPatch, value: bool) -> None:
    """What HF_HUB_OFFLINE=1 does."""
    patch.setattr(constants, "HF_HUB_OFFLINE", value)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", value)
