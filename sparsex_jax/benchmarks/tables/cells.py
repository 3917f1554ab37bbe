"""What tables are made of."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Label = Callable[[int], str]


def format_number(value: float) -> str:
    """Three significant digits, never with an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):g}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)
    )  # fmt: skip


def place(names: Sequence[str], name: str) -> int:
    """Of a name in an order; behind all, if it is not in it."""
    return names.index(name) if name in names else len(names)


def note_mark(number: int) -> str:
    """Of a note below a table, from 0."""
    return f"[{number + 1}]"


def if_measured(row: Row | None, text: Callable[[Row], str]) -> str:
    """The text of a row that was measured, the status of one that was not, nothing for none."""
    if row is None:
        return ""
    return text(row) if row["status"] == "measured" else row["status"].replace("_", " ")


def optional_number(value: float | None) -> str:
    """A number, or nothing."""
    return "" if value is None else format_number(value)
