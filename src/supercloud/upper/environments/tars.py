"""Reading tars from strangers: tarfile, with limits before it believes a header."""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supercloud.model.errors import Invalid, NoResources
from supercloud.upper.environments.limits import Limits

# What tarfile raises on a malformed archive, beside its own errors.
MEMBER_ERRORS = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    IndexError,
    KeyError,
    RecursionError,
    EOFError,
    zlib.error,
)
_EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}


@contextmanager
def opened(path: Path, limits: Limits, where: str) -> Iterator[tarfile.TarFile]:
    """The uncompressed tar at ``path``. Raises ``Invalid``, also for what its reader meets."""

    class Member(tarfile.TarInfo):
        """Refuses extended headers that would be read into memory whole."""

        def _proc_member(self, tar: tarfile.TarFile) -> Any:
            if self.type in _EXTENDED and not 0 <= self.size <= limits.header_bytes:
                raise NoResources("an entry's extended header is too large", where=where)
            return super()._proc_member(tar)  # type: ignore[misc]

    try:
        with tarfile.open(path, mode="r:", tarinfo=Member) as tar:
            yield tar
    except MEMBER_ERRORS as error:
        raise Invalid(f"the tar is malformed: {error}", where=where) from error


class Members:
    """Iterates over the entries without keeping them all; counts them."""

    def __init__(self, tar: tarfile.TarFile, limits: Limits, where: str) -> None:
        self.tar, self.limits, self.where = tar, limits, where
        self.count = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while (member := self.tar.next()) is not None:
            self.tar.members.clear()  # type: ignore[attr-defined]
            self.count += 1
            if self.count > self.limits.entries:
                raise NoResources("the tar has too many entries", where=self.where)
            if member.size < 0:
                raise Invalid("an entry has a negative size", where=self.where)
            yield member
        self._check_end()

    def _check_end(self) -> None:
        """Refuse what tarfile takes for the end: a damaged header amidst the archive."""
        file = self.tar.fileobj
        if file is not None:
            file.seek(self.tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise Invalid("the tar has a damaged header", where=self.where)
