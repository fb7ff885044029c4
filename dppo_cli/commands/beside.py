"""How `dppo sample` shows text as it grows: beside each other in a terminal, below each other elsewhere."""

from types import TracebackType
from typing import Self

from rich.live import Live
from rich.table import Table
from rich.text import Text

from dppo_cli.config.checks import visible
from dppo_cli.telemetry.table import RichConsole


class Beside:
    """The samples of one prompt, a column for each name. `begin` a sample, `add` text to it, `end` it."""

    def __init__(self, names: list[str], samples: int, silent: bool) -> None:
        self.names, self.samples, self.silent = names, samples, silent
        self.console = RichConsole(highlight=False)
        self.texts: dict[str, list[str]] = {name: [] for name in names}
        self.name = names[0]
        self.live: Live | None = None
        if self.console.is_terminal and len(names) > 1 and not silent:
            self.live = Live(self._table(), console=self.console, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def begin(self, name: str, number: int) -> None:
        self.name = name
        self.texts[name].append("")
        if not self.live and (len(self.names) > 1 or self.samples > 1):
            self._out(f"{name}{f' {number + 1}' if self.samples > 1 else ''}: ")

    def add(self, text: str) -> None:
        self.texts[self.name][-1] += text
        if self.live:
            self.live.update(self._table())
        else:
            self._out(shown(text))

    def end(self, text: str) -> None:
        """`text`: what the sample came to."""
        self.texts[self.name][-1] = text
        if self.live:
            self.live.update(self._table(), refresh=True)
        else:
            self._out("\n")

    def _out(self, text: str) -> None:
        if self.silent:
            return
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:  # Nobody reads any more (`| head`).
            self.silent = True

    def _table(self) -> Table:
        table = Table(*self.names, expand=True, show_lines=self.samples > 1)
        for column in table.columns:
            column.ratio, column.overflow = 1, "fold"
        for i in range(max(map(len, self.texts.values()))):
            table.add_row(*(Text(shown(texts[i])) if i < len(texts) else "" for texts in self.texts.values()))
        return table


def shown(text: str) -> str:
    """Text without effects on a terminal but tabs and line breaks."""
    return visible(text, keep="\t\n")
