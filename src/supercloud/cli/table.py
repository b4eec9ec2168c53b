"""Plain tables and times for people, without a library."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from supercloud.cli.failure import printable
from supercloud.model.sizes import format_size

EPOCH_LEAST_S = 1e9  # a larger number of seconds is a time, a smaller one a duration


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as what is in them, two spaces between; control characters are replaced."""
    cells = [list(header), *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def age(then_s: float, now_s: float) -> str:
    """How long ago, in one unit: ``42s``, ``3h``; nothing for a time that is not known."""
    if not then_s:
        return ""
    seconds = max(0, int(now_s - then_s))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def rounded(size_bytes: int) -> str:
    """In the largest unit of which there is one, with one digit."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f}{unit}"
    return f"{size_bytes}B" if size_bytes else ""


def tree(value: Any, indent: str = "") -> Iterable[str]:
    """A JSON value as indented ``key: value`` lines; what is empty is left out."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                yield f"{indent}{printable(str(key))}:"
                yield from tree(item, indent + "  ")
            elif item not in ("", None, [], {}):
                yield f"{indent}{printable(str(key))}: {_scalar(item, str(key))}"
    elif isinstance(value, list):
        for item in value:
            lines = list(tree(item, indent + "  "))
            if lines:
                yield f"{indent}- {lines[0].strip()}"
                yield from lines[1:]
    else:
        yield f"{indent}{_scalar(value)}"


def _scalar(value: Any, key: str = "") -> str:
    """In the unit that people read; the unit of a number stands in its key."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("_s") and value > EPOCH_LEAST_S:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(value))
    if isinstance(value, int) and key.endswith("_bytes"):
        return format_size(value)
    return printable(str(value))
