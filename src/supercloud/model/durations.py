"""Durations in seconds as people write them: ``10m``."""

import re

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WANTED = "a duration such as 90s, 10m or 1h (s, m, h, d)"
_DURATION = re.compile(r"([0-9]{1,9})([smhd])")


def parse_duration(text: str) -> int:
    """The seconds of ``10m``; ValueError says what is allowed."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(WANTED)
    return int(match[1]) * UNITS[match[2]]


def format_duration(seconds: int) -> str:
    """The shortest exact form: ``10m``."""
    for unit, length in reversed(UNITS.items()):
        if seconds and seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
