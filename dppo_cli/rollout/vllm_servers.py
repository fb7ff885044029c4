"""Asks vLLM servers over HTTP: all of them to load an adapter, whichever has the least to do for samples.

A server that does not answer is waited for, or done without while others do. One that was started again gets the
adapter again, and what it was asked. One that hangs is found by asking it what it serves while it works on requests.
"""

import asyncio
import warnings
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2

from dppo_cli.errors import RolloutError
from dppo_cli.rollout.vllm_gone import Attempts, GoneError, Watch
from dppo_cli.rollout.vllm_http import (
    CONNECTING,
    GONE,
    NOT_ALLOWED,
    PAUSE,
    Served,
    absent,
    headers,
    not_allowed,
    status_and_words,
    words,
)

# anyio 4.16 says so of a request that is given up in the moment in which it begins to connect.
warnings.filterwarnings("ignore", "coroutine 'connect_tcp", RuntimeWarning)

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
    gone: bool = False  # when it was last asked, it did not answer
    watch: Watch = field(default_factory=Watch)


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
        warn: Callable[[str], None],
    ) -> None:
        """`served`: by address. `concurrent`: requests at each."""
        self.timeout, self.patience, self.warn, self.key = timeout, patience, warn, key
        self.servers = [Server(url, of, asyncio.Semaphore(concurrent)) for url, of in served.items()]
        self.adapters: list[Adapter] = []  # that servers have; the last is what is sampled from

    def __enter__(self) -> "Servers":
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self.thread.start()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx2.Timeout(self.timeout, connect=CONNECTING)
        self.http = httpx2.AsyncClient(headers=headers(self.key), timeout=timeout, limits=limits)
        self.watches = [self._run(s.watch.run(self.http, s.url, partial(self._patience_with, s))) for s in self.servers]
        return self

    def __exit__(self, *_: object) -> None:
        """Requests in progress are given up; a server sees that, and stops to work on them."""
        with suppress(TimeoutError):
            self._run(self._close()).result(2 * CONNECTING)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def load(self, adapter: Adapter) -> None:
        """What is sampled from then on; the model itself before. Servers that do not answer get it when they do."""
        self.adapters.append(adapter)
        self._run(self._load_everywhere(adapter)).result()

    def unload(self, adapter: Adapter) -> None:
        """Servers that do not answer keep it."""
        self.adapters.remove(adapter)
        self._run(self._unload(adapter)).result()

    def complete(self, body: Mapping[str, Any]) -> Future[bytes]:
        """A server's answer to a request for completions, less its key `model`. Cancel it to give it up."""
        return self._run(self._complete(body, self._newest()))

    def complete_at(self, server: Server, body: Mapping[str, Any]) -> bytes | None:
        """The same by a particular server, now. None if it does not answer while others do."""
        reply: bytes | None = self._run(self._complete_at(server, body, self._newest())).result()
        return reply

    def _newest(self) -> Adapter | None:
        return self.adapters[-1] if self.adapters else None

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _complete(self, body: Mapping[str, Any], adapter: Adapter | None) -> bytes:
        attempts = Attempts(self.patience)
        while True:
            # One that answers; of these the one with the least to do.
            server = min(self.servers, key=lambda s: (s.gone, s.asked))
            server.asked += 1
            try:
                async with server.turns:
                    if server.gone and self._others(server):
                        continue  # It went while this request waited for its turn.
                    attempts.begin()
                    return await self._ask(server, body, adapter)
            except GoneError as why:
                await self._without(server, why, attempts)
            finally:
                server.asked -= 1

    async def _complete_at(self, server: Server, body: Mapping[str, Any], adapter: Adapter | None) -> bytes | None:
        attempts = Attempts(self.patience)
        while True:
            attempts.begin()
            try:
                return await self._ask(server, body, adapter)
            except GoneError as why:
                await self._without(server, why, attempts)
                if self._others(server):
                    return None

    async def _ask(self, server: Server, body: Mapping[str, Any], adapter: Adapter | None) -> bytes:
        name = server.served.model if adapter is None else adapter.name
        for _ in range(RELOADS):
            status, reply = await self._post(server, "/v1/completions", {**body, "model": name})
            if status == NOT_FOUND and adapter is not None:
                server.compared = False  # It was started again, perhaps as another.
                await self._load(server, adapter)
                continue
            if status != httpx2.codes.OK:
                raise self._refused(server, status, reply)
            return reply
        raise RolloutError(f"the vLLM server at {server.url} loses the adapter it was given; see what it prints")

    async def _load_everywhere(self, adapter: Adapter) -> None:
        attempts = Attempts(self.patience)
        while True:
            attempts.begin()
            loads = [self._load(server, adapter) for server in self.servers]
            found = await asyncio.gather(*loads, return_exceptions=True)
            gone: list[tuple[Server, GoneError]] = []
            for server, why in zip(self.servers, found, strict=True):
                if isinstance(why, GoneError):
                    self._tell(server, why)
                    gone.append((server, why))
                elif why is not None:
                    raise why
            if len(gone) < len(self.servers):
                return
            await self._without(*gone[0], attempts)

    async def _load(self, server: Server, adapter: Adapter) -> None:
        async with server.loading:
            body = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
            status, reply = await self._post(server, "/v1/load_lora_adapter", body)
        if status == httpx2.codes.OK or b"already been loaded" in reply:
            return
        if status == NOT_FOUND and b"dapter" not in reply:
            raise RolloutError(
                f"the vLLM server at {server.url} takes no adapters while it runs; start it with: {server.served.start}"
            )
        if status == NOT_FOUND:
            raise RolloutError(
                f"the vLLM server at {server.url} does not find {adapter.path}; on another machine it has to see this "
                f"folder under the same path: rollout.adapters=FOLDER. It says: {words(reply, self.key)}"
            )
        raise self._refused(server, status, reply)

    async def _unload(self, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name}
        here = [server for server in self.servers if not server.gone]
        posts = (
            self.http.post(f"{server.url}/v1/unload_lora_adapter", json=body, timeout=CONNECTING) for server in here
        )
        await asyncio.gather(*posts, return_exceptions=True)

    async def _post(self, server: Server, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and answer. Raises GoneError, or RolloutError for an answer that takes too long."""
        try:
            async with server.watch.request():
                reply = await self.http.post(f"{server.url}{path}", json=body)
        except httpx2.ReadTimeout:
            late = f"has not answered within rollout.timeout={self.timeout:g} seconds"
            if self._others(server):
                raise GoneError(f"it {late}", heard=True) from None
            raise RolloutError(
                f"the vLLM server at {server.url} {late}; raise it, or lower rollout.concurrent_prompts"
            ) from None
        except httpx2.HTTPError as error:
            heard = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise GoneError(words(str(error).encode(), self.key) or type(error).__name__, heard) from None
        if reply.status_code in GONE and not any(word in reply.content for word in (b"LoRA", b"add_lora")):
            # Of a status 500 it may be the request that is at fault: the server's words say so in the end. An adapter
            # that it cannot take is such a one.
            raise GoneError(status_and_words(reply, self.key))
        if server.gone:
            server.gone = server.compared = False
        return reply.status_code, reply.content

    async def _without(self, server: Server, why: GoneError, attempts: "Attempts") -> None:
        """Raise RolloutError if attempts have failed for too long; wait where no other server answers."""
        self._tell(server, why)
        if attempts.over(why):
            raise RolloutError(absent(server.url, str(why), self.patience, server.served.start))
        if not self._others(server):
            await asyncio.sleep(PAUSE)

    def _tell(self, server: Server, why: GoneError) -> None:
        """Once each time that it stops answering."""
        if not server.gone:
            server.gone = True
            others = self._others(server)
            going_on = "1 other goes on" if others == 1 else f"{others} others go on"
            what = going_on if others else f"waiting {self.patience:g} seconds for it"
            self.warn(f"the vLLM server at {server.url} does not answer ({why}); {what}")

    def _patience_with(self, server: Server) -> float:
        # None with one that was gone before: a new adapter waits until that has loaded it, or has not.
        return 0.0 if server.gone else self.patience

    def _others(self, server: Server) -> int:
        """How many answer besides."""
        return sum(not other.gone for other in self.servers if other is not server)

    def _refused(self, server: Server, status: int, reply: bytes) -> RolloutError:
        if status in NOT_ALLOWED:
            return not_allowed(server.url, self.key)
        hint, said = "", words(reply, self.key)
        if "lora" in said.lower() or "logprobs" in said:
            hint = f"; start it with: {server.served.start}"
        return RolloutError(f"the vLLM server at {server.url} refuses: {status} {said}{hint}")

    async def _close(self) -> None:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*map(self._unload, self.adapters))
        await self.http.aclose()
