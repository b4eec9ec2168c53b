"""Who a process runs as: names of the image's own passwd and group files, read without trust."""

import contextlib
import os

from supercloud.model.errors import Invalid
from supercloud.model.records import dataclass, field
from supercloud.upper.platform.agent.syscalls import open_in_root

MAX_FILE_BYTES = 1 << 20
MAX_ID = 65535


@dataclass(frozen=True, slots=True)
class User:
    """Ids inside the container, and the home directory."""

    uid: int = 0
    gid: int = 0
    groups: list[int] = field(default_factory=list)
    home: str = "/"


def resolve(user: str, root: str) -> User:
    """``uid[:gid]`` or names, as in an OCI image's config; empty is root. Invalid if unknown."""
    name, _, group = (user or "0").partition(":")
    passwd, groups = _table(root, "/etc/passwd", 7), _table(root, "/etc/group", 4)
    row = next((r for r in passwd if name in (r[0], r[2])), None)
    uid = _number(row[2] if row else name, user)
    gid = _number(row[3], user) if row else 0
    if group:
        found = next((r for r in groups if group in (r[0], r[2])), None)
        gid = _number(found[2] if found else group, user)
    login = row[0] if row else ""
    more = [_number(r[2], user) for r in groups if login and login in r[3].split(",")]
    home = row[5] if row and row[5].startswith("/") else "/"
    return User(uid, gid, [] if group else more[:64], home)


def _number(text: str, user: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > MAX_ID:
        raise Invalid(f"no such user in the image: {user!r:.80}")
    return int(text)


def _table(root: str, path: str, columns: int) -> list[list[str]]:
    """Rows of a colon-separated file of the image; nothing when it has none."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # O_NONBLOCK: a FIFO in its place must not stop us
            with open(open_in_root(directory, path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                text = (file.read(MAX_FILE_BYTES) or b"").decode("utf-8", "replace")
            rows = [line.split(":") for line in text.splitlines()]
            return [row for row in rows if len(row) == columns]
    finally:
        os.close(directory)
    return []
