"""Every error the user can meet, as one tree.

DppoError                 one line: what is wrong, what you have, what to type     exit status 2
├── ConfigError           a key, a choice, a value, or a combination of them
├── ModelError            weights, tokenizer or architecture
├── DataError             a data file, a line or a column of it
├── RewardError           the user's reward function
├── ReplyError            the user's environment or tools
├── RolloutError          a server that samples
├── RunError              a run folder, an export target, the disk
└── NumericalError        NaN or infinity where none may be                        exit status 1

Stopped                   a signal asked the run to stop                           exit status 128 + its number
"""

from collections.abc import Sequence


class DppoError(Exception):
    """Its text is shown to the user as it is, without a stack trace."""

    exit_status = 2


class ConfigError(DppoError):
    """A key, a choice, a value, or a combination of them cannot work."""


class ModelError(DppoError):
    """Weights or tokenizer are missing, or the architecture is one we cannot drive truthfully."""


class DataError(DppoError):
    """A data file cannot be read as the config says."""


class RewardError(DppoError):
    """The reward function cannot be loaded, failed, or did not return a list of numbers."""


class ReplyError(DppoError):
    """A function that answers the model cannot be loaded, failed, or did not return a reply."""


class RolloutError(DppoError):
    """A server that samples does not answer, refuses, or serves something else."""


class RunError(DppoError):
    """A folder to read is not there, a folder to write is taken, or the disk refuses."""


class NumericalError(DppoError):
    """A NaN or an infinity reached a place where it would be trained on.

    `tokens`: which of a batch's tokens, if known.
    """

    exit_status = 1

    def __init__(self, text: str, tokens: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.tokens = tokens


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that nothing but the run itself handles it.

    Its text says what was saved, and how to go on.
    """

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text)
        self.signum = signum

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int, str]]:
        """Launchers hand it from one process to another."""
        return Stopped, (self.signum, str(self))

    @property
    def exit_status(self) -> int:
        return 128 + self.signum
