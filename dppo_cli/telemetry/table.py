"""How commands print: the two-column table at the end, and warnings."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class RichConsole(Console):
    """Where nobody reads any more (`| head`), it falls silent; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def print_table(title: str, rows: Sequence[tuple[str, str]], console: RichConsole | None = None) -> None:
    """A two-column table. Long values are folded, not cut: somebody may want to copy a path."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or RichConsole(highlight=False)).print(table)


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"


def print_warning(text: str) -> None:
    """What a command without a live display warns of."""
    RichConsole(highlight=False, soft_wrap=True).print(f"warning: {text}", style="yellow", markup=False)
