"""What `dppo doctor` says of the working folder, the folder of the user's config, and the hub."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row, first_line
from dppo_cli.config.saved import is_ours, sign, user_folder

GIB = 2**30
LITTLE = 1.0
"""GiB of disk below which checkpoints may fail."""
HUB_SECONDS = 4.0
REACHABLE, OFFLINE = "reachable", "offline"


def disk() -> Iterator[Row]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    text, facts = f"{free:.1f} GiB free in {here}", {"free_gib": free}
    if not os.access(here, os.W_OK | os.X_OK):
        fix = "dppo train run_dir=SOMEWHERE/ELSE"
        yield Row("disk", PROBLEM, f"{here} cannot be written, and runs are written below it", fix, facts)
    elif free < LITTLE:
        yield Row("disk", WARNING, f"{text}: hardly enough for checkpoints", facts=facts)
    else:
        yield Row("disk", OK, text, facts=facts)


def signatures() -> Iterator[Row]:
    """Whether a run can be signed, by which it is later known as the user's own."""
    folder = user_folder()
    if is_ours(sign("dppo doctor\n")):
        yield Row("signatures", OK, f"runs are signed with {folder / 'key'}")
    else:
        text = f"no key can be kept in {folder}; runs that name code of yours are read only with trust=true"
        yield Row("signatures", WARNING, text, f"mkdir -p {folder} && chmod u+rwx {folder}")


def start_hub() -> tuple[Thread, list[str]]:
    """Ask the hub for a sign of life, in a thread, because looking up a name has no time limit; what came back."""
    answers: list[str] = []

    def ask() -> None:
        try:
            from huggingface_hub import constants, get_session

            if constants.HF_HUB_OFFLINE:
                answers.append(OFFLINE)
            else:
                get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
                answers.append(REACHABLE)
        except Exception as error:
            answers.append(first_line(error))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    return thread, answers


def reaches_hub(thread: Thread, answers: list[str]) -> Iterator[Row]:
    """What came back of `start_hub`."""
    thread.join(HUB_SECONDS)
    answer = answers[0] if answers else f"no answer in {HUB_SECONDS:g} seconds"
    facts = {"reachable": answer == REACHABLE, "offline": answer == OFFLINE}
    if answer == REACHABLE:
        yield Row("hub", OK, "Hugging Face answers: models are loaded by name", facts=facts)
    elif answer == OFFLINE:
        text = "HF_HUB_OFFLINE is set: models are loaded from folders and the local cache"
        yield Row("hub", OK, text, "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE", facts)
    else:
        text = f"Hugging Face does not answer ({answer}): models are loaded from folders and the local cache"
        yield Row("hub", WARNING, text, "export HF_HUB_OFFLINE=1", facts)


def token() -> Iterator[Row]:
    """Whether there is a token for the hub; never which."""
    from huggingface_hub import get_token

    if get_token():
        yield Row("hub token", OK, "there is one", facts={"present": True})
    else:
        text = "none; models with a licence to accept, such as Llama, cannot be downloaded"
        yield Row("hub token", OK, text, "hf auth login", {"present": False})
