"""From sampled token ids to a `Completion`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dppo_cli.errors import NumericalError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.stop_strings import before_first
from dppo_cli.types import Completion, PolicyReport, Status


def completion(
    policy: Policy, token_T: Tensor, mu: PolicyReport, stop: Sequence[str], version: int, ended: bool = False
) -> Completion:
    """The response `token_T`, int64, all of it sampled by `version` of `policy` with the report `mu`.

    `stop`: the texts that end a response; its text ends before the first. `ended`: whether it is known to have ended.
    Raises NumericalError for log-probs that are not finite.
    """
    token_T, mu = token_T.cpu(), mu.to(torch.device("cpu"))
    if not torch.isfinite(mu.logp_N).all():
        raise NumericalError(
            "the log-probs of a sampled response are not finite: the policy is broken. Try a lower optim.lr"
        )
    ids = token_T.tolist()
    text, stopped = policy.decode(ids), ended
    # Looked for where special tokens show their text, too.
    if stop and any(string in policy.tokenizer.decode(ids) for string in stop):
        text, stopped = before_first(text, stop), True
    return Completion(
        token_ids_T=token_T,
        sampled_T=torch.ones_like(token_T, dtype=torch.bool),
        mu=mu,
        text=text,
        status=Status.FINISHED if stopped or ids[-1] in policy.eos_ids else Status.CUT,
        versions=(version,),
    )
