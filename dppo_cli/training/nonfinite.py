"""An update whose batch gives a NaN or an infinity."""

from collections.abc import Sequence
from itertools import chain, count

from dppo_cli.errors import NumericalError
from dppo_cli.training.failures import describe
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.trainer import Trainer, UpdateResult
from dppo_cli.types import Group


def update(learner: Trainer, groups: Sequence[Group], step: int, folder: RunFolder, on_nonfinite: str) -> UpdateResult:
    """One update. A batch that gives a NaN or an infinity is kept, and ends the run or is left out."""
    try:
        return learner.update(groups)
    except NumericalError as error:
        # A step has several updates.
        names = (f"nonfinite-step-{step}{more}.json" for more in chain([""], (f"-{n}" for n in count(2))))
        name = next(name for name in names if not (folder.path / name).exists())
        folder.write(name, describe(groups))
        text = f"step {step}: {error}; no weight was changed, and the batch is in {folder.path / name}"
        if on_nonfinite == "stop":
            raise NumericalError(text) from None
        learner.warn(f"{text}; this update is left out")
        return learner.skipped(groups)
