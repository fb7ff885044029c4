"""What tests of commands share as fixtures."""

from pathlib import Path
from typing import Any

import pytest
from disturbed import outcome
from ended_runs import WORDS, write_reward
from helpers import train


@pytest.fixture(scope="session")
def undisturbed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the run of `ended_runs` where nothing ends it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_reward(folder)
        assert train(tiny_models["llama3"], *WORDS, "run_dir=run") == 0
        return outcome(folder / "run")
