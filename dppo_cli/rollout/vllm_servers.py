"""Asks vLLM servers over HTTP: all of them to load an adapter, whichever has the least to do for samples.

A server that does not answer is waited for, or done without while others do. One that was started again gets the
adapter again, and what it was asked.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2

from dppo_cli.errors import RolloutError
from dppo_cli.rollout.vllm_http import CONNECTING, GONE, PAUSE, Served, absent, headers, status_and_words, words

NOT_FOUND = 404
RELOADS = 3
"""Of an adapter for one request, before it is given up."""


@dataclass(frozen=True)
class Adapter:
    """`name`: used once. A server keeps what it has computed of prompts by the name of the adapter."""

    name: str
    path: Path


@dataclass
class Server:
    url: str
    served: Served
    turns: asyncio.Semaphore
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: int = 0  # requests that it works on, or that wait for their turn
    compared: bool = False  # with the trainer's model, since it was last away
    gone_since: float | None = None  # seconds, of a clock that only runs forward; None: it answers


class GoneError(Exception):
    """A server cannot be reached, or says that it cannot work. The text says why."""


class Servers:
    """Opened (`with servers:`), used, closed. Its requests run in a thread of its own."""

    def __init__(
        self,
        served: Mapping[str, Served],
        *,
        key: str | None,
        concurrent: int,
        timeout: float,
        patience: float,
        start: str,
        warn: Callable[[str], None],
    ) -> None:
        """`served`: by address. `concurrent`: requests at each. `start`: what starts a server, for messages."""
        self.timeout, self.patience, self.start, self.warn, self.key = timeout, patience, start, warn, key
        self.servers = [Server(url, of, asyncio.Semaphore(concurrent)) for url, of in served.items()]
        self.adapter: Adapter | None = None

    def __enter__(self) -> "Servers":
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self.thread.start()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx2.Timeout(self.timeout, connect=CONNECTING)
        self.http = httpx2.AsyncClient(headers=headers(self.key), timeout=timeout, limits=limits)
        return self

    def __exit__(self, *_: object) -> None:
        """Requests in progress are given up; a server sees that, and stops to work on them."""
        with suppress(RolloutError, TimeoutError):
            self._run(self._close()).result(CONNECTING)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def load(self, adapter: Adapter) -> None:
        """What is sampled from then on; the model itself before. Servers that do not answer get it when they do."""
        self.adapter = adapter
        self._run(self._load_everywhere(adapter)).result()

    def unload(self, adapter: Adapter) -> None:
        """Servers that do not answer keep it."""
        self._run(self._unload(adapter)).result()

    def complete(self, body: Mapping[str, Any]) -> Future[bytes]:
        """A server's answer to a request for completions, less its key `model`. Cancel it to give it up."""
        return self._run(self._complete(body, self.adapter))

    def complete_at(self, server: Server, body: Mapping[str, Any]) -> bytes | None:
        """The same by a particular server, now. None if it does not answer while others do."""
        reply: bytes | None = self._run(self._complete_at(server, body, self.adapter)).result()
        return reply

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _complete(self, body: Mapping[str, Any], adapter: Adapter | None) -> bytes:
        while True:
            # One that answers; of these the one with the least to do.
            server = min(self.servers, key=lambda s: (s.gone_since is not None, s.asked))
            server.asked += 1
            try:
                async with server.turns:
                    return await self._ask(server, body, adapter)
            except GoneError as why:
                await self._without(server, why)
            finally:
                server.asked -= 1

    async def _complete_at(self, server: Server, body: Mapping[str, Any], adapter: Adapter | None) -> bytes | None:
        while True:
            try:
                return await self._ask(server, body, adapter)
            except GoneError as why:
                await self._without(server, why)
                if any(other.gone_since is None for other in self.servers):
                    return None

    async def _ask(self, server: Server, body: Mapping[str, Any], adapter: Adapter | None) -> bytes:
        name = server.served.model if adapter is None else adapter.name
        for _ in range(RELOADS):
            status, reply = await self._post(server, "/v1/completions", {**body, "model": name})
            if status == NOT_FOUND and adapter is not None:
                await self._load(server, adapter)  # It was started again.
                continue
            if status != httpx2.codes.OK:
                raise self._refused(server, status, reply)
            return reply
        raise RolloutError(f"the vLLM server at {server.url} loses the adapter it was given; see what it prints")

    async def _load_everywhere(self, adapter: Adapter) -> None:
        while not any(await asyncio.gather(*(self._loaded(server, adapter) for server in self.servers))):
            await asyncio.sleep(PAUSE)

    async def _loaded(self, server: Server, adapter: Adapter) -> bool:
        try:
            await self._load(server, adapter)
        except GoneError as why:
            await self._without(server, why, wait=False)
            return False
        return True

    async def _load(self, server: Server, adapter: Adapter) -> None:
        async with server.loading:
            body = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
            status, reply = await self._post(server, "/v1/load_lora_adapter", body)
        if status == httpx2.codes.OK or b"already been loaded" in reply:
            return
        if status == NOT_FOUND and b"dapter" not in reply:
            raise RolloutError(
                f"the vLLM server at {server.url} takes no adapters while it runs; start it with: {self.start}"
            )
        if status == NOT_FOUND:
            raise RolloutError(
                f"the vLLM server at {server.url} does not find {adapter.path}; on another machine it has to see this "
                f"folder under the same path: rollout.adapters=FOLDER. It says: {words(reply, self.key)}"
            )
        raise self._refused(server, status, reply)

    async def _unload(self, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name}
        here = [server for server in self.servers if server.gone_since is None]
        posts = (
            self.http.post(f"{server.url}/v1/unload_lora_adapter", json=body, timeout=CONNECTING) for server in here
        )
        await asyncio.gather(*posts, return_exceptions=True)

    async def _post(self, server: Server, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and answer. Raises GoneError, or RolloutError for an answer that takes too long."""
        try:
            reply = await self.http.post(f"{server.url}{path}", json=body)
        except httpx2.ReadTimeout:
            raise RolloutError(
                f"the vLLM server at {server.url} has not answered within rollout.timeout={self.timeout:g} seconds; "
                "raise it, or lower rollout.concurrent_prompts"
            ) from None
        except httpx2.HTTPError as error:
            raise GoneError(words(str(error).encode(), self.key) or type(error).__name__) from None
        if reply.status_code in GONE and b"LoRA" not in reply.content:
            # Of a status 500 it may be the request that is at fault: the server's words say so in the end. An adapter
            # that it cannot take is such a one.
            raise GoneError(status_and_words(reply, self.key))
        if server.gone_since is not None:
            server.gone_since, server.compared = None, False
        return reply.status_code, reply.content

    async def _without(self, server: Server, why: GoneError, wait: bool = True) -> None:
        """Raise RolloutError if no server has answered for too long; wait where there is no other."""
        now = time.monotonic()
        if server.gone_since is None:
            server.gone_since = now
            others = sum(other.gone_since is None for other in self.servers)
            what = f"{others} others go on" if others else f"waiting {self.patience:g} seconds for it"
            self.warn(f"the vLLM server at {server.url} does not answer ({why}); {what}")
        since = [other.gone_since for other in self.servers]
        if all(at is not None and now - at >= self.patience for at in since):
            raise RolloutError(absent(server.url, str(why), self.patience, self.start))
        if wait and None not in since:
            await asyncio.sleep(PAUSE)

    def _refused(self, server: Server, status: int, reply: bytes) -> RolloutError:
        hint = " (its key is in the variable that rollout.api_key_env names)" if status in (401, 403) else ""
        said = words(reply, self.key)
        if "lora" in said.lower() or "logprobs" in said:
            hint = f"; start it with: {self.start}"
        return RolloutError(f"the vLLM server at {server.url} refuses: {status} {said}{hint}")

    async def _close(self) -> None:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await self.http.aclose()
