"""Sizes in bytes as people write them: ``128MiB``."""

import re

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
WANTED = "a size such as 128MiB or 1.5GiB (KiB, MiB, GiB, TiB), or a number of bytes"
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,6}))?(KiB|MiB|GiB|TiB)")


def parse_size(text: str) -> int:
    """The number of bytes of ``128MiB`` or ``134217728``; ValueError says what is allowed."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(WANTED)
    whole, fraction, unit = match.groups()
    return int(whole) * UNITS[unit] + _fraction_bytes(fraction or "", UNITS[unit])


def _fraction_bytes(digits: str, unit_bytes: int) -> int:
    """Rounded down to whole bytes; by integers, for floats would lose large ones."""
    return int(digits) * unit_bytes // 10 ** len(digits) if digits else 0


def format_size(size_bytes: int) -> str:
    """The shortest exact form: ``128MiB``; what is not a multiple of 1 KiB stays a number."""
    for unit, unit_bytes in reversed(UNITS.items()):
        if size_bytes and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return str(size_bytes)
