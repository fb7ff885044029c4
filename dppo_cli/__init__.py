"""Fine-tune language models with Divergence Proximal Policy Optimization."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dppo_cli.reading import open_run, open_sweep

__version__ = "0.1.0"
__all__ = ["__version__", "open_run", "open_sweep"]


def __getattr__(name: str) -> Any:
    # Every start of the command line imports this file, and needs no reader.
    if name in ("open_run", "open_sweep"):
        from dppo_cli import reading

        return getattr(reading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
