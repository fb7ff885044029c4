"""What a server has to be: how it is started, and whether it samples from the trainer's own model, tempered."""

import shlex
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dppo_cli.errors import RolloutError
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.vllm_servers import Server

DEFAULT_PORT = 8000
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""
TOKENS = 16
"""Of a response that is compared, at most."""
TEMPERATURES = (1.0, 2.0)
"""At which responses are compared: at the first, log-probs with and without the temperature are the same."""
FAR, OTHER = 0.3, 2.0
"""Mean |log pi - log mu| at temperature 1, nats, from which on the user is told, and from which on a run is refused.
Different precisions make some hundredths, a 4-bit copy of the weights some tenths, another model several nats."""
NOISE = 0.01
"""The same, that is nothing."""


def compare(
    policy: Policy,
    prompt: Sequence[int],
    sampled: Sequence[tuple[Tensor, Tensor]],
    server: Server,
    warn: Callable[[str], None],
) -> None:
    """Raise RolloutError if what a server has sampled after `prompt` has other log-probs than the trainer gives it.

    `sampled`: tokens and their log mu, [T] each, at each of `TEMPERATURES`.
    """
    (plain_T, log_mu_T), (tempered_T, log_mu_tempered_T) = sampled

    def distance(token_T: Tensor, log_mu_T: Tensor, temperature: float) -> float:
        return float((log_probs(policy, prompt, token_T, temperature) - log_mu_T).abs().mean())

    found = distance(plain_T, log_mu_T, 1.0)
    if not found < OTHER:  # so that NaN is too far
        raise RolloutError(
            f"the vLLM server at {server.url} serves another model than {policy.path}: {server.served.model}, with "
            f"log-probs that differ by {found:.2g} nats a token; start it with: {server.served.start}"
        )
    with_it, without = (distance(tempered_T, log_mu_tempered_T, t) for t in (TEMPERATURES[1], 1.0))
    if with_it > NOISE and without < with_it / 2:
        raise RolloutError(
            f"the vLLM server at {server.url} reports log-probs without the temperature; start it with: "
            f"{server.served.start}"
        )
    if found > FAR:
        warn(
            f"log-probs of the vLLM server at {server.url} differ from the trainer's by {found:.2g} nats a token: "
            "compare model, precision and quantisation of both"
        )


@torch.no_grad()
def log_probs(policy: Policy, prompt: Sequence[int], token_T: Tensor, temperature: float) -> Tensor:
    """log pi of tokens after a prompt, float32 [T] on the CPU."""
    training = policy.model.training
    policy.model.eval()
    try:
        ids_1L = torch.tensor([[*prompt, *token_T.tolist()]], device=policy.device)
        hidden_TH = hidden_states(policy, ids_1L)[0, len(prompt) - 1 : -1]
        logp_TV = policy.head.at(temperature).log_probs(hidden_TH).cpu()
    finally:
        policy.model.train(training)
    return logp_TV.gather(-1, token_T[:, None]).squeeze(-1)


def start_command(policy: Policy, max_logprobs: int, ahead: int, url: str) -> str:
    """What starts a server at `url` that suits this policy; it has the adapters of so many steps ahead at once."""
    words = ["vllm", "serve", shlex.quote(policy.path), "--dtype", str(policy.dtype).removeprefix("torch.")]
    words += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", str(max_logprobs)]
    port = urlsplit(url).port
    words += ["--port", str(port)] if port not in (None, DEFAULT_PORT) else []
    if policy.device.type == "cpu":
        # On a CPU vLLM 0.32 dies of a seed with a prompt that it runs in parts.
        words += ["--no-enable-chunked-prefill"]
    if policy.peft is None:
        return " ".join(words)
    rank = max(getattr(config, "r", 1) for config in policy.peft.peft_config.values())
    allowed = next((known for known in RANKS if known >= rank), rank)
    words += ["--enable-lora", "--max-lora-rank", str(allowed)]
    words += ["--max-loras", str(1 + ahead)] if ahead else []
    return " ".join(["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", *words])
