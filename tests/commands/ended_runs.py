"""What tests of runs that end early share: a run, and a reward of the user that can break it."""

import errno
from pathlib import Path

WORDS = (
    "steps=4",
    "optim.lr=0.01",
    "eval.every=2",
    "data.eval_problems=6",
    "reward.path=mine.py:late",
    "reward.max_failures=2",
)
FULL = OSError(errno.ENOSPC, "No space left on device")

REWARD = """\
import os
import sys
from pathlib import Path

called = 0


def late(prompts, completions, **columns):
    global called
    called += 1
    rewards = [sum(ord(c) % 16 for c in text) / (15 * max(1, len(text))) for text in completions]
    # The evaluation at the start (6 samples), steps 1 and 2 (8 samples each), an evaluation, and step 3; then
    # repetitions by other processes, a group (4) or a sample at a time.
    if Path("broken").exists() and (called == 5 or len(prompts) in (1, 4)):
        {broken}
    return rewards
"""


def write_reward(work: Path, broken: str = "pass") -> None:
    (work / "mine.py").write_text(REWARD.format(broken=broken))
    (work / "broken").touch()
