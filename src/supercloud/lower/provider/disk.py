"""Driver for disk backing: sparse files in its private directory, for scratch disks and volumes.

One for ``objects`` is never written to: it books what a user's object store may take in the private
directory of its own domain. One for ``checkpoint`` takes what a machine writes to its scratch disk
while that is being read.

A file is booked with its full size on its user's scheduling context before it exists, so that a
user can never hold more than the quota. The descriptor is handed out for reading and writing; its
holder could make the file longer, so the driver cuts files back to their size every few seconds.
What is booked follows from the files alone: after a restart it is compared and corrected.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.model.errors import Exists, Invalid, NoResources, NotFound
from supercloud.wire.portal import Reply, Request

STATE = "/run/state"
USER_PREFIX = "user:"
USES = ("scratch", "volume", "objects", "checkpoint")
WATCH_S = 5.0
MAX_DISK_BYTES = 1 << 45
MAX_DISKS_OF_ONE_USER = 1024
_BLOCK = 4096

log = logging.getLogger("supercloud.lower.disk")


@dataclass(frozen=True, slots=True)
class Disk:
    """One backing file; ``size_bytes`` is part of its file name, so the two never differ.

    ``use`` is what it is for: names of different uses never meet.
    """

    user: str
    use: str
    name: str
    size_bytes: int

    @property
    def path(self) -> str:
        """Its file."""
        return f"{directory_of(self.user)}/{self.use}:{self.name}.{self.size_bytes}"


def directory_of(user: str) -> str:
    """Where a user's files are."""
    return f"{STATE}/{hashlib.sha256(user.encode()).hexdigest()[:16]}-{user}"


class DiskDriver(Component):
    """The files of all users."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.serve(
            USER_PREFIX,
            {
                "disk.create": self.create,
                "disk.open": self.open,
                "disk.grow": self.grow,
                "disk.delete": self.delete,
                "disk.list": self.names,
            },
        )
        self.serve("admin", {"driver.status": self.status})
        self.serve("multiplexing", {"user.forget": self.forget})
        self.lost = self._user_lost
        self.reactor.every(WATCH_S, self._cut_back)
        self._reconciled: set[str] = set()

    def create(self, request: Request) -> Reply:
        """``{use, name, size_bytes}`` -> a descriptor (O_RDWR), and whether it was ``made``.

        The same again gives the same disk.
        """
        disk, found = self._asked(request)
        if found is not None and found != disk:
            raise Exists(f"disk {disk.name} is there with {found.size_bytes} bytes")
        if found is None:
            self._make(disk)
        return Reply({"made": found is None}, [_opened(disk)])

    def open(self, request: Request) -> Reply:
        """``{use, name}`` -> a descriptor (O_RDWR) of the disk that is there. NotFound."""
        name = request.name("name")
        found = _find(_user(request), _use(request), name)
        if found is None:
            raise NotFound(f"no disk {name}")
        return Reply({"size_bytes": found.size_bytes}, [_opened(found)])

    def grow(self, request: Request) -> dict[str, Any]:
        """``{use, name, size_bytes}``: that large from now on; never smaller. NotFound."""
        disk, found = self._asked(request)
        if found is None:
            raise NotFound(f"no disk {disk.name}")
        if disk.size_bytes < found.size_bytes:
            raise Invalid(f"disk {disk.name} has {found.size_bytes} bytes", where="size_bytes")
        if disk != found:
            more = disk.size_bytes - found.size_bytes
            with self._charged(disk.user, more):
                os.truncate(found.path, disk.size_bytes)
                os.rename(found.path, disk.path)  # the size by name holds from here on
            log.info("disk %s of %s: now %d bytes", disk.name, disk.user, disk.size_bytes)
        return {}

    def delete(self, request: Request) -> dict[str, Any]:
        """``{use, name}``: gone, also when it was not there."""
        user, use, name = _user(request), _use(request), request.name("name")
        self._reconcile(user)
        found = _find(user, use, name)
        if found is not None:
            os.unlink(found.path)
            self.core.charge(self._context(user), -found.size_bytes)
            log.info("disk %s of %s deleted", name, user)
        return {}

    def names(self, request: Request) -> list[str]:
        """``{use}`` -> names of the user's disks."""
        use = _use(request)
        return [disk.name for disk in _disks(_user(request)) if disk.use == use]

    def status(self, _request: Request) -> dict[str, Any]:
        """For the admin console: sizes, no contents."""
        users = [name.removeprefix(USER_PREFIX) for name in self.channels if ":" in name]
        disks = [disk for user in users for disk in _disks(user)]
        space = os.statvfs(STATE)
        return {
            "driver": "disk",
            "disks": [
                {
                    "user": d.user,
                    "use": d.use,
                    "name": d.name,
                    "size_bytes": d.size_bytes,
                    "used_bytes": _used(d),
                }
                for d in disks[:MAX_DISKS_OF_ONE_USER]
            ],
            "free_bytes": space.f_bavail * space.f_frsize,
        }

    def _asked(self, request: Request) -> tuple[Disk, Disk | None]:
        """The disk that a request is about, and the one that is there under its name."""
        user, use, name = _user(request), _use(request), request.name("name")
        disk = Disk(user, use, name, request.number("size_bytes", 1, MAX_DISK_BYTES))
        if disk.size_bytes % _BLOCK:
            raise Invalid(f"a disk is a multiple of {_BLOCK} bytes", where="size_bytes")
        self._reconcile(user)
        return disk, _find(user, use, name)

    def _make(self, disk: Disk) -> None:
        if len(_disks(disk.user)) >= MAX_DISKS_OF_ONE_USER:
            raise Invalid("too many disks")
        os.makedirs(directory_of(disk.user), mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with self._charged(disk.user, disk.size_bytes):
            descriptor = os.open(disk.path, flags, 0o600)
            try:
                os.ftruncate(descriptor, disk.size_bytes)
            except OSError:
                os.unlink(disk.path)
                raise
            finally:
                os.close(descriptor)
        log.info("disk %s of %s: %d bytes", disk.name, disk.user, disk.size_bytes)

    @contextlib.contextmanager
    def _charged(self, user: str, size_bytes: int) -> Iterator[None]:
        """Booked while and after it is done. NoResources by quota or file system: not booked."""
        context = self._context(user)
        self.core.charge(context, size_bytes)
        try:
            yield
        except OSError as error:
            self.core.charge(context, -size_bytes)
            raise NoResources(
                f"the provider's file system does not take {size_bytes} bytes: {error.strerror}",
                hint="use another provider, or ask this one for room",
            ) from error

    def _context(self, user: str) -> int:
        return self.core.lookup(f"sched:{user}").selector

    def _reconcile(self, user: str) -> None:
        """Book what the files say; a crash in between may have left a difference."""
        if user in self._reconciled:
            return
        context = self._context(user)
        booked = self.core.usage(context).booked_disk_bytes
        wanted = sum(disk.size_bytes for disk in _disks(user))
        if wanted != booked:
            log.warning("booked for %s: %d bytes, files have %d", user, booked, wanted)
            self.core.charge(context, wanted - booked)
        self._reconciled.add(user)

    def _user_lost(self, name: str) -> None:
        """A domain ended, which its user may have anew: what was booked is to be booked again."""
        self._reconciled.discard(name.removeprefix(USER_PREFIX))

    def forget(self, request: Request) -> dict[str, Any]:
        """``{user}``, from the multiplexing: no longer of this host, and so is what it stored."""
        user = request.name("user")
        self._reconciled.discard(user)
        for disk in _disks(user):
            os.unlink(disk.path)
        if os.path.isdir(directory_of(user)):
            os.rmdir(directory_of(user))
        return {}

    def _cut_back(self) -> None:
        for name in self.channels:
            for disk in _disks(name.removeprefix(USER_PREFIX)):
                try:
                    if os.stat(disk.path).st_size != disk.size_bytes:
                        log.warning("disk %s of %s had another size", disk.name, disk.user)
                        os.truncate(disk.path, disk.size_bytes)
                except OSError:  # of one: the others are cut back all the same
                    log.exception("disk %s of %s has another size", disk.name, disk.user)


def _user(request: Request) -> str:
    return request.peer.removeprefix(USER_PREFIX)


def _use(request: Request) -> str:
    use = request.untrusted.get("use", "scratch")
    if use not in USES:
        raise Invalid(f"a disk is for one of {', '.join(USES)}", where="use")
    return str(use)


def _find(user: str, use: str, name: str) -> Disk | None:
    return next((disk for disk in _disks(user) if (disk.use, disk.name) == (use, name)), None)


def _opened(disk: Disk) -> int:
    return os.open(disk.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _disks(user: str) -> list[Disk]:
    try:
        files = os.listdir(directory_of(user))
    except FileNotFoundError:
        return []
    found = []
    for file in sorted(files):
        whole, _, size = file.rpartition(".")
        use, colon, name = whole.partition(":")
        if not colon:  # of a release that had scratch disks only
            use, name = USES[0], whole
            os.rename(f"{directory_of(user)}/{file}", Disk(user, use, name, int(size)).path)
        found.append(Disk(user, use, name, int(size)))
    return found


def _used(disk: Disk) -> int:
    return os.stat(disk.path).st_blocks * 512


if __name__ == "__main__":
    os.umask(0o077)
    DiskDriver(Core()).run()
