"""A finished export as a repository on the Hugging Face hub. The token is the library's own: it is in no text."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from dppo_cli.errors import RunError

IN_TEXT = re.compile(r"HTTP status \w+ error \((\d{3})")
"""How hf_xet, which uploads the large files, tells the status."""
REASONS = {
    401: "the hub does not accept the token (401); log in again with `hf auth login`",
    402: "the account's plan does not allow it (402)",
    403: "the token may not write there (403); it needs write access, and the owner must be you or your organisation",
    404: "the hub has no such owner or repository for this token (404)",
    409: "the repository is being changed by something else (409); try again",
    413: "a file is too large for the hub (413)",
    429: "the hub has had too many requests (429); try again later",
}


def check_hub(name: str) -> None:
    """Raise RunError unless there is a token that the hub knows."""
    if get_token() is None:
        raise RunError(f"push_to_hub={name} needs a token with write access: `hf auth login`, or HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # The client and its HTTP library raise errors of many kinds.
        raise RunError(f"push_to_hub={name}: {_reason(error)}; nothing was exported") from None


def publish(folder: Path, name: str, private: bool) -> str:
    """Upload a folder; the address. Raises RunError, which says that the folder stays, if the hub refuses."""
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Upload an export of dppo")
    except Exception as error:  # The same.
        raise RunError(
            f"push_to_hub={name}: {_reason(error)}; the export is complete in {folder}: `hf upload {name} {folder}`"
        ) from None
    return f"{constants.ENDPOINT}/{name}"


def _reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and (said := IN_TEXT.search(str(error))) is not None:
        status = int(said[1])
    if status is not None:
        return REASONS.get(status, f"the hub answered with status {status}")
    if error.__cause__ is not None:
        return _reason(error.__cause__)
    return f"the hub ({constants.ENDPOINT}) does not answer ({type(error).__name__})"
