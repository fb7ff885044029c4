"""Whether a server samples from the trainer's own model, and reports the log-probs of the tempered distribution."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dppo_cli.errors import RolloutError
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.vllm_servers import Server

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
    start: str,
    warn: Callable[[str], None],
) -> None:
    """Raise RolloutError if what a server has sampled after `prompt` has other log-probs than the trainer gives it.

    `sampled`: tokens and their log mu, [T] each, at each of `TEMPERATURES`. `start`: what starts a server.
    """
    (plain_T, log_mu_T), (tempered_T, log_mu_tempered_T) = sampled

    def distance(token_T: Tensor, log_mu_T: Tensor, temperature: float) -> float:
        return float((log_probs(policy, prompt, token_T, temperature) - log_mu_T).abs().mean())

    found = distance(plain_T, log_mu_T, 1.0)
    if not found < OTHER:  # so that NaN is too far
        raise RolloutError(
            f"the vLLM server at {server.url} serves another model than {policy.path}: {server.served.model}, with "
            f"log-probs that differ by {found:.2g} nats a token; start it with: {start}"
        )
    with_it, without = (distance(tempered_T, log_mu_tempered_T, t) for t in (TEMPERATURES[1], 1.0))
    if with_it > NOISE and without < with_it / 2:
        raise RolloutError(
            f"the vLLM server at {server.url} reports log-probs without the temperature; start it with: {start}"
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
