"""What flows through a run.

    Prompt --rollout--> Completion --reward--> Score --advantage--> Group --learner--> Batch --loss--> step

Shapes: T tokens of one response, N sampled tokens of a batch (or of one response), K reported log-probs per token,
H hidden size, P padded prompts of length L, B responses of padded length R, V vocabulary. mu = the policy that
sampled, pi = the policy in training. Log-probs are natural logarithms, of the tempered and untruncated distribution.
"""

from dppo_cli.types.batch import Batch, PaddedPrompts, Sample, SampleStats, TokenStats
from dppo_cli.types.group import Completion, Example, Group, Messages, Prompt, Score, Status
from dppo_cli.types.listener import EvalReport, Listener, RunInfo, StepReport
from dppo_cli.types.report import LogProbHead, PolicyReport

__all__ = [
    "Batch",
    "Completion",
    "EvalReport",
    "Example",
    "Group",
    "Listener",
    "LogProbHead",
    "Messages",
    "PaddedPrompts",
    "PolicyReport",
    "Prompt",
    "RunInfo",
    "Sample",
    "SampleStats",
    "Score",
    "Status",
    "StepReport",
    "TokenStats",
]
