"""What becomes of a run that an error ends: its last finished step is saved, and the error says where."""

import signal
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from dppo_cli.errors import DppoError, RunError, Stopped
from dppo_cli.training.checkpoint import newest_good
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.state import RunState


def rescue(
    error: BaseException, state: RunState, folder: RunFolder, finish: Callable[[None], dict[str, Any]]
) -> tuple[BaseException, dict[str, Any] | None]:
    """Save the state after the last finished step; the error with where it is, and the run's summary."""
    state.rewind()
    summary = None
    if state.step == 0:
        text = "no step was finished; nothing is saved"
    else:
        try:
            folder.cut(state.step)
            summary = finish(None)
            text = f"the state after step {state.step} is saved; to go on: dppo train resume={folder.path}"
        except (OSError, RunError, SafetensorError) as failed:
            newest = newest_good(folder.path, warn=lambda _: None)
            text = (
                f"the state after step {state.step} could not be saved ({failed}); the newest checkpoint is "
                f"{newest or 'none'}. When it can be written again: dppo train resume={folder.path}"
            )
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT, text), summary
    if isinstance(error, OSError | SafetensorError):
        why = getattr(error, "strerror", None) or error
        return RunError(f"{folder.path} cannot be written any more: {why}; {text}"), summary
    if isinstance(error, Stopped):
        error.args = (text,)
    elif isinstance(error, DppoError):
        error.args = (f"{error}; {text}",)
    else:
        error.add_note(f"dppo: {text}")
    return error, summary
