"""What tests of rollout=vllm share: an open engine, its tokens, and a server with other weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import make
import torch
from engines import TEMPERATURE, sampling
from vllm_server import VLLM

from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.vllm import VLLMEngine, VLLMRollout
from dppo_cli.types import Completion, Prompt

OPTIONS = dict(
    api_key_env=None,
    adapters=None,
    ahead=0,
    seeded=True,
    concurrent_prompts=8,
    max_logprobs=20,
    timeout=30.0,
    patience=5.0,
)


@contextmanager
def opened(
    of: Policy, *servers: VLLM, warn: Callable[[str], None] = make.fail, **options: object
) -> Iterator[VLLMEngine]:
    source = VLLMRollout(**{"url": [server.url for server in servers], **OPTIONS, **options})
    with source.load(of, warn) as engine:
        engine.sync(0)
        yield engine


def tokens(engine: VLLMEngine) -> list[list[int]]:
    prompts = make.prompts(engine.policy)
    return make.tokens(in_order(engine.generate(prompts, 2, sampling(), 0, seed=1)))


def sampled_tokens(completions: list[list[Completion]]) -> torch.Tensor:
    return torch.cat([one.token_ids_T for one in make.flat(completions)])


def log_pi(policy: Policy, prompts: list[Prompt], completions: list[list[Completion]]) -> torch.Tensor:
    """The trainer's log-probs of the sampled tokens."""
    log_pi_NV = make.trained_log_probs(policy, prompts, completions, TEMPERATURE)
    return log_pi_NV.gather(-1, sampled_tokens(completions)[:, None])[:, 0]


def change(server: VLLM, scale: float) -> None:
    """What it serves, from its next adapter on."""
    load = server.load

    def changed(body):
        found = load(body)
        head = server.models[body["lora_name"]].get_output_embeddings()
        random = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
        head.weight.data += scale * head.weight.std() * random
        return found

    server.load = changed
