"""What requests to vLLM servers share, and the first of them: what a server serves."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx2

from dppo_cli.errors import RolloutError

PAUSE = 1.0
"""Seconds between two attempts at servers of which none answers."""
CONNECTING = 10.0
"""Seconds that a server may take to accept a connection, or to say what it serves; and between two such questions."""
GONE = {429, 500, 502, 503, 504}
"""Statuses of servers that are busy, start, or have lost their engine."""
NOT_ALLOWED = {401, 403}
"""Statuses of servers that want a key."""


@dataclass(frozen=True)
class Served:
    """What a server says of itself, and what starts one like it, for messages.

    `longest`: tokens of prompt and response; None if it does not say.
    """

    version: str
    model: str
    longest: int | None
    start: str


def find(url: str, key: str | None, patience: float, start: str) -> Served:
    """What the server at `url` serves, as soon as it answers. Raises RolloutError if it does not."""
    until, told = time.monotonic() + patience, False
    while True:
        try:
            reply = httpx2.get(f"{url}/v1/models", headers=headers(key), timeout=CONNECTING)
            if reply.status_code not in GONE:
                break
            why = status_and_words(reply, key)
        except httpx2.HTTPError as error:
            why = words(str(error).encode(), key) or type(error).__name__
        if time.monotonic() >= until:
            raise RolloutError(
                f"{absent(url, why, patience, start)}; or sample in this process: rollout=local (a run that goes on "
                "cannot; its rollout.url may change)"
            )
        if not told:
            # Said at once: warnings are shown when a run starts, which now waits.
            text = f"dppo: no vLLM server answers at {url} ({why}); waiting {patience:g} seconds for one: {start}"
            print(text, file=sys.stderr, flush=True)
            told = True
        time.sleep(PAUSE)
    if reply.status_code in NOT_ALLOWED:
        raise not_allowed(url, key)
    try:
        base = next(model for model in reply.json()["data"] if not model.get("parent"))
        name, longest = str(base["id"]), base.get("max_model_len")
        version = httpx2.get(f"{url}/version", headers=headers(key), timeout=CONNECTING).json()["version"]
    except (httpx2.HTTPError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise RolloutError(
            f"what answers at rollout.url={url} is no vLLM server: {words(reply.content, key)[:100]!r}"
        ) from None
    return Served(str(version), name, longest if isinstance(longest, int) else None, start)


def headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def not_allowed(url: str, key: str | None) -> RolloutError:
    if key is None:
        return RolloutError(
            f"the vLLM server at {url} wants an API key, and none was sent: rollout.api_key_env is null; export "
            "VLLM_API_KEY=..., and name this variable: rollout.api_key_env=VLLM_API_KEY"
        )
    return RolloutError(f"the vLLM server at {url} wants another key than that which rollout.api_key_env names")


def absent(url: str, why: str, patience: float, start: str) -> str:
    return f"no vLLM server has answered at {url} for rollout.patience={patience:g} seconds ({why}); start one: {start}"


def words(reply: bytes, key: str | None) -> str:
    """A line of what a server says is wrong, without the key."""
    text = reply.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        for key_of_text in ("error", "message", "detail"):
            if isinstance(found, dict) and key_of_text in found:
                found = found[key_of_text]
        text = found if isinstance(found, str) else text
    line = " ".join(text.split())
    return (line.replace(key, "***") if key else line)[:300]


def status_and_words(reply: httpx2.Response, key: str | None) -> str:
    return f"{reply.status_code} {words(reply.content, key)}".rstrip()


def addresses(url: str | Sequence[str]) -> list[str]:
    """One or several, without a slash or /v1 at their end."""
    return [one.rstrip("/").removesuffix("/v1") for one in ([url] if isinstance(url, str) else url)]
