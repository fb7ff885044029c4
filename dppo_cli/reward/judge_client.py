"""Asks an OpenAI-compatible server, with patience: retries, a rate limit, a cache on disk, a cap on the cost."""

import hashlib
import json
import os
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event, Lock
from typing import Any

import httpx2

from dppo_cli.errors import RewardError

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses of servers that are busy."""
REFUSED = {401, 403, 404}
"""Statuses that no other request would change."""
LONGEST_WAIT = 300.0
"""Seconds; no server is waited for longer between two attempts."""


class JudgeError(Exception):
    """One request has no answer. The text says why."""


@dataclass(frozen=True)
class Patience:
    """`pause`: seconds before the first retry, doubled for each further one."""

    timeout: float
    retries: int
    pause: float
    requests_per_minute: float | None


class JudgeClient:
    """Used from several threads. `key`: sent as a bearer token, and never shown."""

    def __init__(
        self,
        url: str,
        key: str | None,
        patience: Patience,
        *,
        cache: Path | None,
        max_requests: int | None,
        max_tokens: int | None,
    ) -> None:
        self.url, self.key, self.patience, self.cache = f"{url.rstrip('/')}/chat/completions", key, patience, cache
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self.lock, self.ended, self.next_at = Lock(), Event(), 0.0
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx2.Client(headers=headers, timeout=patience.timeout)

    def ask(self, body: Mapping[str, Any]) -> str:
        """The text of the answer. Raises JudgeError, or RewardError for what ends the run."""
        text = json.dumps(body, sort_keys=True)
        place = self._place(text)
        if place is not None and (kept := _kept(place)) is not None:
            return kept
        answer = self._answer(text)
        if place is not None:
            _keep(place, answer)
        return answer

    def close(self) -> None:
        """Let all threads that wait give up."""
        self.ended.set()
        self.http.close()

    def _answer(self, body: str) -> str:
        why = ""
        for attempt in range(self.patience.retries + 1):
            self._wait_for_turn()
            pause = self.patience.pause * 2**attempt * random.uniform(0.75, 1.25)
            try:
                reply = self.http.post(self.url, content=body, headers={"Content-Type": "application/json"})
            except httpx2.TimeoutException:
                why = f"it did not answer within {self.patience.timeout:g} seconds"
            except (httpx2.HTTPError, RuntimeError) as error:
                why = f"it cannot be reached ({self._safe(str(error)) or type(error).__name__})"
            else:
                if reply.status_code == 200:
                    return self._content(reply)
                why = f"it answered {reply.status_code} {self._safe(_message(reply))}".rstrip()
                if reply.status_code in REFUSED:
                    hint = (
                        " (its key is in the variable that reward.api_key_env names)"
                        if reply.status_code != 404
                        else ""
                    )
                    raise RewardError(f"the judge at {self.url} refuses: {why}{hint}")
                if reply.status_code not in RETRIED:
                    raise JudgeError(why)
                pause = max(pause, _retry_after(reply))
            if attempt < self.patience.retries and self.ended.wait(min(pause, LONGEST_WAIT)):
                break
        tries = self.patience.retries + 1
        raise JudgeError(f"{why}, {tries} times" if tries > 1 else why)

    def _content(self, reply: httpx2.Response) -> str:
        try:
            found = reply.json()
            content = found["choices"][0]["message"]["content"]
            used = (found.get("usage") or {}).get("total_tokens") or 0
        except (ValueError, LookupError, TypeError, AttributeError):
            raise JudgeError(f"its answer is no chat completion: {self._safe(reply.text)!r}") from None
        with self.lock:
            self.tokens += int(used)
        if not isinstance(content, str):
            raise JudgeError("its answer has no text")
        return content

    def _wait_for_turn(self) -> None:
        """Count the request, and wait as the rate limit says. Raises RewardError where the cost would be too high."""
        with self.lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise RewardError(
                    f"the judge was asked reward.max_requests={self.max_requests} times; raise it to go on"
                )
            if self.max_tokens is not None and self.tokens >= self.max_tokens:
                raise RewardError(
                    f"the judge has used {self.tokens} tokens, and reward.max_total_tokens={self.max_tokens}; raise it "
                    "to go on"
                )
            self.requests += 1
            now = time.monotonic()
            at = max(now, self.next_at)
            if self.patience.requests_per_minute is not None:
                self.next_at = at + 60 / self.patience.requests_per_minute
        if self.ended.wait(at - now):
            raise JudgeError("the run ends")

    def _safe(self, text: str) -> str:
        """A line of a message from elsewhere, without the key."""
        line = " ".join(text.split())
        return (line.replace(self.key, "***") if self.key else line)[:200]

    def _place(self, body: str) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(f"{self.url}\n{body}".encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


def _message(reply: httpx2.Response) -> str:
    """What the server says is wrong."""
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return reply.text


def _retry_after(reply: httpx2.Response) -> float:
    """Seconds that the server asks to wait: a number, or a date."""
    value = reply.headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _kept(place: Path) -> str | None:
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads(place.read_text(encoding="utf-8"))["content"])
    return None


def _keep(place: Path, content: str) -> None:
    """Written beside its place and moved there, so that no half of it is ever read. Raises RewardError."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump({"content": content}, file)
        os.replace(file.name, place)
    except OSError as error:
        raise RewardError(f"reward.cache={place.parent.parent} cannot be written: {error.strerror}") from None
