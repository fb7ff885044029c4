"""Reward by a language model behind an OpenAI-compatible server, which is asked about each response."""

import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dppo_cli.config.build import FilePath, SecretName
from dppo_cli.config.checks import check_rules, did_you_mean
from dppo_cli.config.servers import check_address, secret_of
from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.reward.judge_client import JudgeClient, JudgeError, Patience
from dppo_cli.reward.patterns import TooSlowError, compiled, last_match
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

KEY = "reward.verdict"
WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
Pair = tuple[Prompt, Completion]


@dataclass(frozen=True)
class Judge:
    """See conf/reward/judge.yaml for the fields."""

    url: str
    model: str
    api_key_env: SecretName | None
    template: str
    system: str | None
    verdict: str
    scale: float
    temperature: float
    max_tokens: int
    extra: dict[str, Any] | None
    timeout: float
    retries: int
    pause: float
    concurrency: int
    requests_per_minute: float | None
    cache: FilePath | None
    max_requests: int | None
    max_total_tokens: int | None
    default: float | None
    max_failures: int

    def __post_init__(self) -> None:
        compiled(KEY, self.verdict)
        rules = {
            "scale is finite and not 0": math.isfinite(self.scale) and self.scale != 0,
            "temperature >= 0": self.temperature >= 0,
            "max_tokens >= 1": self.max_tokens >= 1,
            "0 < timeout <= 86400": 0 < self.timeout <= 86400,
            "retries >= 0": self.retries >= 0,
            "pause >= 0": self.pause >= 0,
            "concurrency >= 1": self.concurrency >= 1,
            "requests_per_minute > 0 or null": self.requests_per_minute is None or self.requests_per_minute > 0,
            "max_requests >= 1 or null": self.max_requests is None or self.max_requests >= 1,
            "max_total_tokens >= 1 or null": self.max_total_tokens is None or self.max_total_tokens >= 1,
            "default is a finite number or null": self.default is None or math.isfinite(self.default),
            "max_failures >= 1": self.max_failures >= 1,
        }
        check_rules("reward", self, rules)
        check_address("reward.url", self.url, "http://host:port/v1")
        if not any(name == "completion" for _, name, _, _ in _fields(self.template)):
            raise ConfigError("reward.template does not show the response; write {completion} where it belongs")
        if taken := {"messages", "model", "temperature", "max_tokens", "stream", "n"} & (self.extra or {}).keys():
            raise ConfigError(f"reward.extra.{min(taken)} is set by dppo itself; leave it out")

    def load(self, warn: Callable[[str], None]) -> Scorer:
        key = None if self.api_key_env is None else secret_of("reward.api_key_env", self.api_key_env)
        client = JudgeClient(
            self.url,
            key,
            Patience(self.timeout, self.retries, self.pause, self.requests_per_minute),
            cache=None if self.cache is None else Path(self.cache),
            max_requests=self.max_requests,
            max_tokens=self.max_total_tokens,
        )
        return JudgeScorer(self, client, warn)


class JudgeScorer:
    """See `EarlyScorer`. Equal requests of a step are asked once."""

    def __init__(self, option: Judge, client: JudgeClient, warn: Callable[[str], None]) -> None:
        self.option, self.client, self.warn = option, client, warn
        self.failures = 0  # in a row
        self.threads = ThreadPoolExecutor(option.concurrency)
        self.asked: dict[str, tuple[Future[Score | str], Pair]] = {}  # of this step, by the text of the request
        self.scores: dict[str, Score] = {}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        # So many at a time that too many failures in a row end it soon.
        size = max(self.option.concurrency, self.option.max_failures)
        try:
            texts = []
            for prompt, group in zip(prompts, completions, strict=True):
                for c in group:
                    if len(self.asked) >= size:
                        self._count(wait=True)
                    texts.append(self._ask((prompt, c)))
            self._count(wait=True)
        except BaseException:  # Ctrl-C, for one: the threads would go on with their attempts.
            self.give_up()
            raise
        scores, self.scores = self.scores, {}
        rest = iter(scores[text] for text in texts)
        return [list(islice(rest, len(group))) for group in completions]

    def begin(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        for c in completions:
            self._ask((prompt, c))
        self._count(wait=False)

    def give_up(self) -> None:
        for answer, _ in self.asked.values():
            answer.cancel()
        self.asked.clear()
        self.client.close()

    def _ask(self, pair: Pair) -> str:
        """The text of the request, which is sent unless this step has sent it."""
        body = self._body(pair)
        text = json.dumps(body, sort_keys=True)
        if text not in self.asked and text not in self.scores:
            self.asked[text] = self.threads.submit(self._score, body), pair
        return text

    def _count(self, wait: bool) -> None:
        """Take the answers in the order in which they were asked for; all of them, or as many as there are."""
        for text, (answer, pair) in list(self.asked.items()):
            if not wait and not answer.done():
                break
            self.scores[text] = self._counted(answer.result(), pair)
            del self.asked[text]

    def _body(self, pair: Pair) -> dict[str, Any]:
        option, (prompt, completion) = self.option, pair
        example = prompt.example
        before = prompt.conversation(completion.said[:-1]) if prompt.messages or completion.messages else ()
        conversation = "\n\n".join(f"{m['role']}: {m['content']}" for m in before) or example.prompt
        names: dict[str, Any] = {**example.columns, "answer": example.answer}
        names |= {"prompt": example.prompt, "conversation": conversation, "completion": completion.text}
        messages = [{"role": "user", "content": _filled(option.template, names)}]
        if option.system is not None:
            messages.insert(0, {"role": "system", "content": option.system})
        return {
            "model": option.model,
            "messages": messages,
            "temperature": option.temperature,
            "max_tokens": option.max_tokens,
            **(option.extra or {}),
        }

    def _score(self, body: Mapping[str, Any]) -> Score | str:
        """A score, or why there is none."""
        try:
            return self._judged(self.client.ask(body))
        except (JudgeError, TooSlowError) as error:
            return str(error)

    def _judged(self, text: str) -> Score | str:
        option = self.option
        found = last_match(KEY, compiled(KEY, option.verdict), text)
        if found is None:
            return f"it gave no verdict: {' '.join(text.split())[-80:]!r}"
        if found.lower() in WORDS:
            return Score(WORDS[found.lower()])
        try:
            value = float(found) / option.scale
        except ValueError:
            value = math.nan
        return Score(value) if math.isfinite(value) else f"its verdict {found[:60]!r} is neither yes, no nor a number"

    def _counted(self, found: Score | str, pair: Pair) -> Score:
        if isinstance(found, Score):
            self.failures = 0
            return found
        option, (prompt, completion) = self.option, pair
        self.failures += 1
        text = f"the judge {option.model} failed on problem {prompt.index} ({completion.text[:60]!r}): {found}"
        if self.failures >= option.max_failures:
            raise RewardError(f"{text}; that is reward.max_failures={option.max_failures} times in a row")
        self.warn(f"{text}; scored as {'not judged' if option.default is None else option.default}")
        return Score(option.default, note=found)


def _fields(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """The fields of a template. Raises ConfigError for one that cannot be filled."""
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"reward.template cannot be read ({error}); write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in found:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ConfigError(
                f"reward.template holds {{{name}}}; write {{completion}}, {{prompt}}, or {{{{ for a brace"
            )
    return found


def _filled(template: str, names: Mapping[str, Any]) -> str:
    parts = []
    for text, name, _, _ in _fields(template):
        if name is not None and name not in names:
            raise RewardError(f"reward.template shows {{{name}}}, which no column is called{did_you_mean(name, names)}")
        parts += [text, "" if name is None else str(names[name])]
    return "".join(parts)
