"""Sampling by vLLM servers (https://docs.vllm.ai), which get the adapter after every step.

mu is what the server says that it sampled with: its processed log-probs, of the tempered distribution. Servers have the
trainer's base in a copy and in kernels of their own, so mu differs from pi before any update, by what `mismatch_mean`
shows. DPPO is anchored on mu, and needs no more.
"""

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.config.build import FilePath, SecretName
from dppo_cli.config.checks import check_rules
from dppo_cli.config.sections import LoRA, Sampling
from dppo_cli.config.servers import check_address, secret_of
from dppo_cli.errors import ConfigError, RolloutError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.completions import completion
from dppo_cli.rollout.engine import seeds_of
from dppo_cli.rollout.vllm_http import addresses, find
from dppo_cli.rollout.vllm_probe import TEMPERATURES, TOKENS, compare, start_command
from dppo_cli.rollout.vllm_reply import read_choices
from dppo_cli.rollout.vllm_servers import Adapter, Servers
from dppo_cli.types import Completion, Prompt

LEAST = 0.01
"""vLLM samples at no lower temperature; 0 is greedy."""


@dataclass(frozen=True)
class VLLMRollout:
    """See conf/rollout/vllm.yaml for the fields."""

    url: Any  # an address, or a list of them
    api_key_env: SecretName | None
    adapters: FilePath | None
    ahead: int
    seeded: bool
    concurrent_prompts: int
    max_logprobs: int
    timeout: float
    patience: float

    in_each_process: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rules = {
            "concurrent_prompts >= 1": self.concurrent_prompts >= 1,
            "0 <= ahead <= 8": 0 <= self.ahead <= 8,
            "max_logprobs >= 1": self.max_logprobs >= 1,
            "0 < timeout <= 86400": 0 < self.timeout <= 86400,
            "0 <= patience <= 86400": 0 <= self.patience <= 86400,
        }
        check_rules("rollout", self, rules)
        urls = [self.url] if isinstance(self.url, str) else self.url
        if not isinstance(urls, list) or not urls:
            raise ConfigError(f"rollout.url={self.url} is no address; write http://host:port, or a list of them")
        for url in urls:
            check_address("rollout.url", url, "http://host:port")
        if len(set(addresses(urls))) < len(urls):
            raise ConfigError("rollout.url names a server twice")

    def check(self, num_logprobs: int, adapter: LoRA | None) -> None:
        if num_logprobs == WHOLE_VOCABULARY:
            raise ConfigError(
                "approx=full needs the sampler's whole distribution, which a server does not send; use approx=topk, or "
                "rollout=local"
            )
        if num_logprobs > self.max_logprobs:
            raise ConfigError(
                f"approx.k={num_logprobs} is more than rollout.max_logprobs={self.max_logprobs}, the longest list the "
                "servers send; lower approx.k, or raise it here and at the servers (--max-logprobs)"
            )
        if adapter is not None and adapter.use_dora:
            raise ConfigError("vLLM cannot sample with DoRA (adapter.use_dora); use adapter=lora, or rollout=local")

    def load(self, policy: Policy, warn: Callable[[str], None]) -> "VLLMEngine":
        key = None if self.api_key_env is None else secret_of("rollout.api_key_env", self.api_key_env)
        served = {}
        for url in addresses(self.url):
            start = start_command(policy, self.max_logprobs, self.ahead, url)
            served[url] = find(url, key, self.patience, start)
        if getattr(policy.model, "is_quantized", False):
            warn(
                "the base is in 4 bits here, and in the servers as they were started: --quantization bitsandbytes is "
                "nearest; mismatch_mean shows how far mu and pi are apart"
            )
        servers = Servers(
            served,
            key=key,
            concurrent=self.concurrent_prompts,
            timeout=self.timeout,
            patience=self.patience,
            warn=warn,
        )
        return VLLMEngine(policy, servers, self, warn)


class VLLMEngine:
    """See `RolloutEngine`. Equal calls give tokens that are equal but for rounding, which depends on what else runs.

    `generate` begins when it is called, and goes on while the engine is synced, and the policy trained.
    """

    def __init__(self, policy: Policy, servers: Servers, options: VLLMRollout, warn: Callable[[str], None]) -> None:
        self.policy, self.servers, self.warn = policy, servers, warn
        # Of its own, because several runs may use a server, and a name never comes again.
        self.name = f"dppo-{secrets.token_hex(6)}"
        self.folder = Path(options.adapters or tempfile.gettempdir()) / self.name
        self.ahead = options.ahead
        self.mode = 0o777 if options.adapters else 0o700
        self.seeded = options.seeded
        self.synced = 0
        self.version: int | None = None

    def __enter__(self) -> "VLLMEngine":
        self.servers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.servers.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.version = None

    @property
    def samples_with(self) -> str:
        one, *others = self.servers.servers
        more = f" and {len(others)} more" if others else ""
        return f"vLLM {one.served.version} at {one.url}{more}, {one.served.model} with the adapter beside it"

    def sync(self, version: int) -> None:
        self.synced += 1
        if self.policy.peft is not None:
            path = self.folder / str(self.synced)
            try:
                self.folder.mkdir(mode=self.mode, parents=True, exist_ok=True)
                path.mkdir(mode=self.mode)
                self.policy.save_adapter(path)
            except OSError as error:
                raise RolloutError(
                    f"rollout.adapters={self.folder.parent} cannot be written: {error.strerror}"
                ) from None
            self.servers.load(Adapter(f"{self.name}-{self.synced}", path.resolve()))
            # All but those that requests may still use.
            for old in self.servers.adapters[: -1 - self.ahead]:
                self.servers.unload(old)
                shutil.rmtree(old.path, ignore_errors=True)
        self.version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        assert self.version is not None, "sync the engine before its first use"
        version, k = self.version, min(num_logprobs, self.policy.head.weight_VH.shape[0])
        self._check_length(prompts, sampling.max_new_tokens)
        if 0 < sampling.temperature < LEAST:
            raise RolloutError(
                f"a temperature of {sampling.temperature:g} is {LEAST:g} for vLLM; use 0, or {LEAST:g} or more"
            )
        if prompts:
            self._compare_new(prompts[0].token_ids, sampling)
        # vLLM takes one greedy sample a request; all others are equal to it.
        copies = samples_per_prompt if sampling.temperature == 0 else 1
        bodies = [
            self._body(p.token_ids, samples_per_prompt // copies, sampling, k, own)
            for p, own in zip(prompts, seeds_of(prompts, seed, numbers), strict=True)
        ]
        answers = {self.servers.complete(body): number for number, body in enumerate(bodies)}

        def groups() -> Iterator[tuple[int, list[Completion]]]:
            for number, reply in self._answered(answers):
                # One that was away may have come back as another.
                self._compare_new(prompts[0].token_ids, sampling)
                read = read_choices(reply, k)
                # Those that a server gave up are missing: a group may be smaller.
                found = [completion(self.policy, t, mu, sampling.stop, version, ended) for t, mu, ended in read]
                yield number, found * copies

        return groups()

    def _answered(self, answers: dict[Future[bytes], int]) -> Iterator[tuple[int, bytes]]:
        """A prompt's number and a server's answer, as they come. Answers are not kept."""
        try:
            for answer in as_completed(list(answers)):
                yield answers.pop(answer), answer.result()
        finally:
            for answer in answers:
                answer.cancel()

    def _body(
        self, prompt: Sequence[int], samples: int, sampling: Sampling, num_logprobs: int, seed: int
    ) -> dict[str, Any]:
        """A request. What it does not say would be the server's default, or its model's."""
        return {
            "prompt": list(prompt),
            "n": samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            # Sample g of a prompt gets this plus g, and the sum has to fit into 64 bits, too.
            "seed": seed >> 1 if self.seeded else None,
            "logprobs": num_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # A response ends as in this process: by the tokens that the policy knows as its ends, and no others.
            "ignore_eos": True,
            "stop_token_ids": list(self.policy.eos_ids),
            "stop": list(sampling.stop),
            "skip_special_tokens": False,
        }

    def _compare_new(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise RolloutError for a server whose log-probs are not those of the trainer's model."""
        room = min(TOKENS, sampling.max_new_tokens)
        for server in self.servers.servers:
            if server.compared or server.gone:
                continue
            sampled = []
            for temperature in TEMPERATURES:
                how = Sampling(temperature, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=room, stop=[])
                body = {**self._body(prompt, 1, how, 0, seed=0), "stop_token_ids": []}
                reply = self.servers.complete_at(server, body)
                sampled += [] if reply is None else [(t, mu.logp_N) for t, mu, _ in read_choices(reply, 0)]
            if server.gone:
                continue
            if len(sampled) < len(TEMPERATURES):
                raise RolloutError(f"the vLLM server at {server.url} gives responses up; see what it prints")
            compare(self.policy, prompt, sampled, server, self.warn)
            server.compared = True

    def _check_length(self, prompts: Sequence[Prompt], room: int) -> None:
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids), default=None)
        for server in self.servers.servers:
            most = server.served.longest
            if longest is not None and most is not None and len(longest.token_ids) + room > most:
                raise RolloutError(
                    f"problem {longest.index} has {len(longest.token_ids)} tokens, and with "
                    f"sampling.max_new_tokens={room} it is longer than the {most} that the vLLM server at {server.url} "
                    "takes; start it with a larger --max-model-len"
                )
