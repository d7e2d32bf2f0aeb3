"""What a person or a program gets to read: tables, lines and JSON.

Names in a checkpoint come from strangers. Nothing of them reaches a terminal as a control sequence, or a table as
markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fastload.errors import MissingDependencyError

__all__ = ["print_json", "print_line", "print_table", "printable", "require_tables"]

# A table that goes to a file or another program is as wide as its contents.
_UNBOUNDED_COLUMNS = 10_000


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with characters that a terminal would obey, or could not show, escaped. ``lines`` keeps line ends."""
    shown = "".join(
        character if character.isprintable() or (lines and character == "\n") else ascii(character)[1:-1]
        for character in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def print_line(text: str = "") -> None:
    """One line, or several, for a person."""
    print(printable(text, lines=True))


def print_json(values: object) -> None:
    """An object for a program."""
    # Escaped to ASCII: a key may hold what the terminal's encoding lacks.
    print(json.dumps(values, indent=2))


def require_tables() -> None:
    """MissingDependencyError where tables cannot be drawn. Called before work is done whose result would be lost."""
    try:
        import rich.table  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "tables are drawn by rich, which is not installed",
            fix='pip install "fastload[cli]", or ask for --json',
        ) from None


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table as wide as the terminal, or as its contents where the output is no terminal.

    Args:
        columns: their titles.
        rows: a text for each column; a row of one text is a heading.
        right: the columns of numbers.
    """
    require_tables()
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        is_number = column in right
        table.add_column(
            column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold", header_style="bold"
        )
    for row in rows:
        table.add_row(*(Text(printable(cell, lines=True)) for cell in row))
    terminal: dict[str, Any] = {} if sys.stdout.isatty() else {"width": _UNBOUNDED_COLUMNS}
    Console(file=sys.stdout, markup=False, highlight=False, emoji=False, **terminal).print(table)
