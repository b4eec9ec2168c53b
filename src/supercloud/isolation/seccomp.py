"""Seccomp allow-lists: data files in ``filters/``, compiled to classic BPF for the core.

A file names groups of calls, each with its reason: ``allow``, or ``refuse`` with an ``errno``;
and checks (``check``) of one argument of one call (``only`` these values, ``never`` these,
``no_bits`` of this mask), else ``errno``. It may ``extend`` another file, whose verdicts
and checks of the same call it replaces. What is named nowhere kills the process.

Only the low 32 bits of an argument are looked at: all that is checked is an ``int`` to the kernel.
"""

import errno
import hashlib
import json
import struct
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FILTERS = Path(__file__).parent / "filters"
HASHES = FILTERS / "hashes.json"
_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_MAX_INSTRUCTIONS = 4096

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on one argument of one call."""

    syscall: str
    argument: int
    errno: int
    only: tuple[int, ...] = ()
    never: tuple[int, ...] = ()
    no_bits: int = 0


@dataclass(slots=True)
class Filter:
    """What one kind of domain may call; ``reasons`` by group or checked call."""

    name: str
    allow: set[str] = field(default_factory=set)
    refuse: dict[str, int] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@cache
def syscalls() -> dict[str, int]:
    """Numbers of the calls of x86_64."""
    numbers: dict[str, int] = json.loads((FILTERS / "syscalls_x86_64.json").read_text())
    return numbers


def names() -> list[str]:
    """All filters there are."""
    return sorted(path.stem for path in FILTERS.glob("*.toml"))


def load(name: str) -> Filter:
    """Read a filter with all that it extends."""
    document = tomllib.loads((FILTERS / f"{name}.toml").read_text())
    filter_ = load(document["extends"]) if "extends" in document else Filter(name)
    filter_.name = name
    for group in document.get("group", []):
        _add_group(filter_, group)
    for check in document.get("check", []):
        filter_.reasons[check["syscall"]] = check["reason"]
        filter_.checks[check["syscall"]] = Check(
            check["syscall"],
            check["argument"],
            getattr(errno, check["errno"]),
            tuple(check.get("only", ())),
            tuple(check.get("never", ())),
            check.get("no_bits", 0),
        )
    return filter_


def _add_group(filter_: Filter, group: dict[str, Any]) -> None:
    filter_.reasons[group["name"]] = group["reason"]
    for name in group.get("allow", []):
        filter_.allow.add(name)
        filter_.refuse.pop(name, None)
    for name in group.get("refuse", []):
        filter_.refuse[name] = getattr(errno, group["errno"])
        filter_.allow.discard(name)


def compile_filter(filter_: Filter) -> bytes:
    """The BPF program, eight bytes an instruction."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    numbers = syscalls()
    for name, check in sorted(filter_.checks.items()):
        block = _check_block(check)
        program += [(_JUMP_EQUAL, 0, len(block), numbers[name]), *block]
    verdicts = dict.fromkeys(filter_.allow, _ALLOW)
    verdicts |= {name: _ERRNO | code for name, code in filter_.refuse.items()}
    for name, verdict in sorted(verdicts.items()):
        if name not in filter_.checks:
            program += [(_JUMP_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, verdict)]
    program.append((_RETURN, 0, 0, _KILL_PROCESS))
    if len(program) > _MAX_INSTRUCTIONS:
        message = f"filter {filter_.name} has {len(program)} instructions"
        raise ValueError(message)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _check_block(check: Check) -> list[Instruction]:
    """Instructions that answer one checked call; every path returns."""
    refuse = (_RETURN, 0, 0, _ERRNO | check.errno)
    allow = (_RETURN, 0, 0, _ALLOW)
    block: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * check.argument)]
    for value in check.only:
        block += [(_JUMP_EQUAL, 0, 1, value), allow]
    for value in check.never:
        block += [(_JUMP_EQUAL, 0, 1, value), refuse]
    if check.no_bits:
        block += [(_JUMP_SET, 0, 1, check.no_bits), refuse]
    return [*block, refuse if check.only else allow]


def compiled(name: str) -> tuple[bytes, str]:
    """(BPF program, its SHA-256) of the filter of that name."""
    program = compile_filter(load(name))
    return program, hashlib.sha256(program).hexdigest()


def write_hashes() -> None:
    """Commit to what the filters compile to; reviewed with them."""
    found = {name: compiled(name)[1] for name in names()}
    HASHES.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    write_hashes()
