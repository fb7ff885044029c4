"""When a vLLM server is gone: it cannot be reached, fails for too long, or answers nothing at all."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx2

from dppo_cli.rollout.vllm_http import CONNECTING


class GoneError(Exception):
    """A server cannot be reached, or says that it cannot work. The text says why. `heard`: it had taken the request."""

    def __init__(self, text: str, heard: bool = False) -> None:
        super().__init__(text)
        self.heard = heard


class Attempts:
    """How long attempts at a request have failed in a row.

    It counts anew after one that a server had worked on for longer than that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: float | None = None
        self.begun = 0.0

    def begin(self) -> None:
        """Another begins."""
        self.begun = time.monotonic()

    def over(self, why: GoneError) -> bool:
        """Whether the attempt that has failed now was the last."""
        now = time.monotonic()
        if self.since is None or (why.heard and now - self.begun > self.seconds):
            self.since = now
        return now - self.since >= self.seconds


class Watch:
    """Gives up the requests at a server that answers nothing. While it works on some it is asked what it serves.

    vLLM says that while it samples, so that a server that is only busy is heard.
    """

    def __init__(self) -> None:
        self.heard = time.monotonic()  # time of its last answer, or when nothing was asked
        self.waits: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around a request. Raises GoneError where it is given up."""
        try:
            async with asyncio.timeout(None) as wait:
                self.waits.add(wait)
                try:
                    yield
                finally:
                    self.waits.discard(wait)
        except TimeoutError:
            raise GoneError(f"it has answered nothing for {time.monotonic() - self.heard:.0f} seconds") from None
        self.heard = time.monotonic()

    async def run(self, http: httpx2.AsyncClient, url: str, patience: Callable[[], float]) -> None:
        """Until it is cancelled. `patience`: seconds for which the server may answer nothing; `CONNECTING` at least."""
        while True:
            await asyncio.sleep(CONNECTING)
            if not self.waits:
                self.heard = time.monotonic()
                continue
            limit = max(patience(), CONNECTING)
            try:
                await http.get(f"{url}/v1/models", timeout=limit)
                self.heard = time.monotonic()
            except httpx2.HTTPError:
                if time.monotonic() - self.heard >= limit:
                    for wait in self.waits:
                        wait.reschedule(0.0)
                    self.waits.clear()
