"""Taking a control plane's state elsewhere: one private file with all that a new one needs.

A tar file: ``rows.jsonl`` (see ``store.archive``), ``tokens.key`` and the files of ``trust/``. It
holds the user's keys: mode 0600, and to be kept like them. Images are made again; what a provider
entry kept for itself stays behind.
"""

import io
import os
import re
import tarfile
from pathlib import Path
from typing import IO

from supercloud.control.store import SqliteStore, archive
from supercloud.model.errors import Exists, Invalid

ROWS, TOKENS, TRUST = "rows.jsonl", "tokens.key", "trust"
MAX_MEMBER_BYTES = 256 << 20
_HINT = "give --adopt the file that --export wrote, whole and unchanged"
_MEMBER = re.compile(r"rows\.jsonl|tokens\.key|trust(/[A-Za-z0-9][A-Za-z0-9.-]{0,127}){1,2}")


async def export(state: Path, to: Path) -> int:
    """Write the state in directory ``state`` to the new file ``to``; how many rows.

    The control plane must not be running. Raises Exists when ``to`` is there.
    """
    store = await SqliteStore.open(state / "state.db")
    try:
        text = io.StringIO()
        rows = await archive.export(store, text)
    finally:
        await store.close()
    with tarfile.open(fileobj=_new(to), mode="w") as tar:
        _add(tar, ROWS, text.getvalue().encode())
        files = [state / TOKENS, *sorted((state / TRUST).rglob("*"))]
        for path in files:
            if path.is_file():
                _add(tar, str(path.relative_to(state)), path.read_bytes())
    return rows


async def adopt(state: Path, untrusted_file: Path) -> int:
    """Fill the empty directory ``state`` from an export; how many rows.

    Raises Exists when there is a state already, Invalid when the file is not an export.
    """
    if (state / "state.db").exists() or (state / TRUST).exists():
        raise Exists(f"there is a state in {state}", hint="give an empty directory as --state")
    members = _members(untrusted_file)
    if ROWS not in members or TOKENS not in members:
        raise Invalid(f"{untrusted_file} is not an export of a control plane", hint=_HINT)
    lines = members.pop(ROWS).decode("utf-8", "replace").splitlines()
    store = await SqliteStore.open(state / "adopting.db")
    try:
        rows = await archive.adopt(store, lines)
    finally:
        await store.close()
    for name, data in members.items():
        path = state / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
    (state / "adopting.db").rename(state / "state.db")  # last: before it, nothing was adopted
    return rows


def _new(path: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, flags, 0o600), "wb")
    except FileExistsError as error:
        raise Exists(
            f"{path} is there already", hint="give --export a file that is not there yet"
        ) from error


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o600
    tar.addfile(info, io.BytesIO(data))


def _members(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                if not info.isreg() or not _MEMBER.fullmatch(info.name) or ".." in info.name:
                    found_text = f"{path} holds {info.name!r:.100}"
                    raise Invalid(f"{found_text}, which is no part of an export", hint=_HINT)
                if info.size > MAX_MEMBER_BYTES:
                    large = f"{info.name} is larger than {MAX_MEMBER_BYTES} bytes"
                    raise Invalid(f"{path}: {large}", hint=_HINT)
                file = tar.extractfile(info)
                found[info.name] = file.read() if file else b""
    except (tarfile.TarError, EOFError) as error:
        raise Invalid(f"{path} is not an export: {error}", hint=_HINT) from error
    return found
