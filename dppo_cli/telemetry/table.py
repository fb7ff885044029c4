"""How commands print: the table at the end, and warnings."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class RichConsole(Console):
    """Where nobody reads any more (`| head`), it falls silent; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def print_table(title: str, rows: Sequence[Sequence[str]], console: RichConsole | None = None) -> None:
    """A table of at least one row. Long values are folded, not cut: somebody may want to copy a path."""
    table = Table(title=title, show_header=False)
    table.add_column()
    for _ in rows[0][1:]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or RichConsole(highlight=False)).print(table)


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"


def with_interval(share: float | None, interval: Sequence[float] | None) -> str:
    """Example: `29.6% (95% interval 25.6 to 33.6%)`."""
    if share is None or interval is None:
        return percent(share)
    low, high = interval
    return f"{share:.1%} (95% interval {100 * low:.1f} to {high:.1%})"


def points(difference: float, interval: Sequence[float] | None) -> str:
    """A difference of two shares. Example: `+67.8 points (95% interval +63.8 to +72.0)`."""
    text = f"{100 * difference:+.1f} points"
    return text if interval is None else f"{text} (95% interval {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def print_warning(text: str) -> None:
    """What a command without a live display warns of."""
    RichConsole(highlight=False, soft_wrap=True).print(f"warning: {text}", style="yellow", markup=False)


def print_to_stderr(text: str) -> None:
    """A warning of a command whose stdout is for other programs."""
    RichConsole(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {text}", style="yellow", markup=False)


def age(seconds: float) -> str:
    """Example: 3 h."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def size(n: float) -> str:
    """Example: 5.3 MiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
