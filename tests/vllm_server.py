"""A server on this machine that answers as vLLM 0.32 does, with a model in transformers and adapters in PEFT."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

LOADING = threading.Lock()
"""transformers patches itself while it loads a model, so that two threads that do at once leave the patch behind."""


class VLLM(ThreadingHTTPServer):
    """What it does otherwise: see the attributes. No thread outlives it: one in torch would break the end of tests."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.models: dict[str, PreTrainedModel | PeftModel] = {"base": self.base()}
        self.work = threading.Lock()
        self.asked: list[tuple[str, Any]] = []
        """Paths and bodies of all requests."""
        self.answered: list[int] = []
        """Statuses of all answers."""
        self.key: str | None = None
        self.processed = True  # log-probs of the tempered distribution
        self.updating = True  # takes adapters
        self.longest_list = 20
        self.longest = 512
        self.abort = 0  # choices of each answer that are given up
        self.refuse: dict[str, list[tuple[int, Any]]] = {}
        """By the end of a path: what the next requests are answered with instead."""
        self.connections: list[Any] = []
        self.hold = threading.Event()
        """Completions wait for it."""
        self.hold.set()
        self.runs = threading.Event()
        """All answers wait for it."""
        self.runs.set()

    def get_request(self) -> tuple[Any, Any]:
        found = super().get_request()
        self.connections.append(found[0])
        return found

    def base(self) -> PreTrainedModel:
        with LOADING:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval()

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked.endswith(path)]

    def adapters(self) -> list[str]:
        return [name for name in self.models if name != "base"]

    def forget(self) -> None:
        """What it has lost when it was started again."""
        self.models = {"base": self.base()}

    def load(self, body: Any) -> tuple[int, Any]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.models:
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            return 404, error(f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        self.models[name] = PeftModel.from_pretrained(self.base(), path).eval()
        return 200, "Success"

    def unload(self, body: Any) -> tuple[int, Any]:
        if self.models.pop(body["lora_name"], None) is None:
            return 404, error("The lora adapter cannot be found.", "NotFoundError")
        return 200, "Success"

    def complete(self, body: Any) -> tuple[int, Any]:
        model = self.models.get(body["model"])  # which it has until it is done, whatever is unloaded
        self.hold.wait(30)
        if model is None:
            return 404, error(f"The model `{body['model']}` does not exist.", "NotFoundError")
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, error("n must be 1 when using greedy sampling")
        if body["logprobs"] > self.longest_list:
            return 400, error(f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed")
        with self.work:
            return 200, {"choices": [self.choice(model, body, index) for index in range(body["n"])]}

    @torch.no_grad()
    def choice(self, model: Any, body: Any, index: int) -> dict[str, Any]:
        ids = list(body["prompt"])
        random = torch.Generator()
        if body["seed"] is not None:
            random.manual_seed(body["seed"] + index)
        tokens: list[int] = []
        reported, lists = [], []
        reason = "length"
        while len(tokens) < body["max_tokens"] and reason == "length":
            logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
            tempered_V = logits_V / (body["temperature"] or 1.0)
            token = int(torch.multinomial(tempered_V.softmax(-1), 1, generator=random))
            if body["temperature"] == 0:
                token = int(logits_V.argmax())
            logp_V = (tempered_V if self.processed else logits_V).log_softmax(-1)
            best = logp_V.topk(body["logprobs"])
            row = {f"token_id:{token}": float(logp_V[token])}
            row |= {f"token_id:{i}": float(v) for i, v in zip(best.indices.tolist(), best.values, strict=True)}
            tokens.append(token)
            ids.append(token)
            reported.append(float(logp_V[token]))
            lists.append({key: max(value, -9999.0) for key, value in row.items()})
            text = self.tokenizer.decode(tokens, skip_special_tokens=body["skip_special_tokens"])
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                reason = "stop"
        if index < self.abort:
            reason = "abort"
        logprobs = {"token_logprobs": reported, "top_logprobs": lists}
        return {"index": index, "text": text, "finish_reason": reason, "token_ids": tokens, "logprobs": logprobs}


class Handler(BaseHTTPRequestHandler):
    server: VLLM
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        status, reply = self.found(body)
        self.server.answered.append(status)
        text = json.dumps(reply).encode()
        with suppress(ConnectionError):  # of a client that has given up
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def found(self, body: Any) -> tuple[int, Any]:
        vllm, path = self.server, self.path
        vllm.asked.append((path, body))
        vllm.runs.wait(30)
        for end, answers in vllm.refuse.items():
            if path.endswith(end) and answers:
                return answers.pop(0)
        if vllm.key is not None and self.headers["Authorization"] != f"Bearer {vllm.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            cards = [{"id": name, "parent": None if name == "base" else "base"} for name in vllm.models]
            return 200, {"data": [{**card, "max_model_len": vllm.longest} for card in cards]}
        if path == "/v1/completions":
            return vllm.complete(body)
        if path == "/v1/load_lora_adapter" and vllm.updating:
            return vllm.load(body)
        if path == "/v1/unload_lora_adapter" and vllm.updating:
            return vllm.unload(body)
        return 404, {"detail": "Not Found"}

    def log_message(self, *_: object) -> None: ...


def error(text: str, kind: str = "BadRequestError") -> dict[str, Any]:
    return {"error": {"message": text, "type": kind}}


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[VLLM]:
    """`port`: 0 for any that is free."""
    server = VLLM(folder, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.hold.set()
        server.runs.set()
        for connection in server.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()  # Waits for all requests.
        thread.join()
