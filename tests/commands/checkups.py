"""What tests of `dppo doctor` share."""

from typing import Any

import pytest

from dppo_cli.commands.checkup.row import Row
from dppo_cli.config.sections import Hardware

AUTO = Hardware("auto", "auto", 2048, 256, False, 1)
Change = pytest.MonkeyPatch


def only(rows: Any) -> Row:
    (row,) = rows
    return row
