"""The verifiers of reasoning-gym in the sandbox. Cannot be imported where that is not to be had."""

from functools import partial

from dppo_cli.errors import RewardError
from dppo_cli.reward.functions import sandbox, verify_task

try:
    sandbox.check()
except sandbox.SandboxError as error:
    raise RewardError(
        f"verifiers of reasoning-gym may run what an answer says, and cannot be locked up here ({error}); use a "
        "machine or container that allows user namespaces (docs/rewards.md), or accept it with reward.sandbox=false"
    ) from None

score = partial(verify_task.score, locked_up=True)
