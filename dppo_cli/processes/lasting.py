"""Imports that stay until the process ends."""

import gc
import importlib
import sys
from types import ModuleType


def load(name: str) -> ModuleType:
    """The module of that name.

    Garbage is not looked for in what a process imports here, neither meanwhile nor later: with torch, transformers and
    PEFT this would take 2 of the 5 seconds in which a command starts and ends.
    """
    if name in sys.modules:
        return sys.modules[name]
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if collects:
            gc.enable()
