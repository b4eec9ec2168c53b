"""Driver for disk backing: sparse files in its private directory, one per platform's scratch disk.

A file is booked with its full size on its user's scheduling context before it exists, so that a
user can never hold more than the quota. The descriptor is handed out for reading and writing; its
holder could make the file longer, so the driver cuts files back to their size every few seconds.
What is booked follows from the files alone: after a restart it is compared and corrected.
"""

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.model.errors import Exists, Invalid
from supercloud.wire.portal import Reply, Request

STATE = "/run/state"
USER_PREFIX = "user:"
WATCH_S = 5.0
MAX_DISK_BYTES = 1 << 45
MAX_DISKS_OF_ONE_USER = 1024
_BLOCK = 4096

log = logging.getLogger("supercloud.lower.disk")


@dataclass(frozen=True, slots=True)
class Disk:
    """One backing file; ``size_bytes`` is part of its file name, so the two never differ."""

    user: str
    name: str
    size_bytes: int

    @property
    def path(self) -> str:
        """Its file."""
        return f"{directory_of(self.user)}/{self.name}.{self.size_bytes}"


def directory_of(user: str) -> str:
    """Where a user's files are."""
    return f"{STATE}/{hashlib.sha256(user.encode()).hexdigest()[:16]}-{user}"


class DiskDriver(Component):
    """The files of all users."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.serve(
            USER_PREFIX,
            {"disk.create": self.create, "disk.delete": self.delete, "disk.list": self.names},
        )
        self.serve("admin", {"driver.status": self.status})
        self.lost = self._user_lost
        self.reactor.every(WATCH_S, self._cut_back)
        self._reconciled: set[str] = set()

    def create(self, request: Request) -> Reply:
        """``{name, size_bytes}`` -> a descriptor (O_RDWR). The same again gives the same disk."""
        disk = Disk(
            _user(request), request.name("name"), request.number("size_bytes", 1, MAX_DISK_BYTES)
        )
        if disk.size_bytes % _BLOCK:
            raise Invalid(f"a disk is a multiple of {_BLOCK} bytes", where="size_bytes")
        self._reconcile(disk.user)
        found = self._find(disk.user, disk.name)
        if found is not None and found != disk:
            raise Exists(f"disk {disk.name} is there with {found.size_bytes} bytes")
        if found is None:
            self._make(disk)
        return Reply({}, [os.open(disk.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)])

    def delete(self, request: Request) -> dict[str, Any]:
        """``{name}``: gone, also when it was not there."""
        user, name = _user(request), request.name("name")
        self._reconcile(user)
        found = self._find(user, name)
        if found is not None:
            os.unlink(found.path)
            self.core.charge(self._context(user), -found.size_bytes)
            log.info("disk %s of %s deleted", name, user)
        return {}

    def names(self, request: Request) -> list[str]:
        """Names of the user's disks."""
        return [disk.name for disk in _disks(_user(request))]

    def status(self, _request: Request) -> dict[str, Any]:
        """For the admin console: sizes, no contents."""
        users = [name.removeprefix(USER_PREFIX) for name in self.channels if ":" in name]
        disks = [disk for user in users for disk in _disks(user)]
        space = os.statvfs(STATE)
        return {
            "driver": "disk",
            "disks": [
                {"user": d.user, "name": d.name, "size_bytes": d.size_bytes, "used_bytes": _used(d)}
                for d in disks[:MAX_DISKS_OF_ONE_USER]
            ],
            "free_bytes": space.f_bavail * space.f_frsize,
        }

    def _make(self, disk: Disk) -> None:
        if len(_disks(disk.user)) >= MAX_DISKS_OF_ONE_USER:
            raise Invalid("too many disks")
        os.makedirs(directory_of(disk.user), mode=0o700, exist_ok=True)
        self.core.charge(self._context(disk.user), disk.size_bytes)  # NoResources: nothing is done
        descriptor = os.open(disk.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, disk.size_bytes)
        finally:
            os.close(descriptor)
        log.info("disk %s of %s: %d bytes", disk.name, disk.user, disk.size_bytes)

    def _find(self, user: str, name: str) -> Disk | None:
        return next((disk for disk in _disks(user) if disk.name == name), None)

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
        """The user is no longer of this host: so is what was stored."""
        if not name.startswith(USER_PREFIX):
            return
        user = name.removeprefix(USER_PREFIX)
        self._reconciled.discard(user)
        for disk in _disks(user):
            os.unlink(disk.path)
        if os.path.isdir(directory_of(user)):
            os.rmdir(directory_of(user))

    def _cut_back(self) -> None:
        for name in self.channels:
            for disk in _disks(name.removeprefix(USER_PREFIX)):
                if os.stat(disk.path).st_size != disk.size_bytes:
                    log.warning("disk %s of %s had another size", disk.name, disk.user)
                    os.truncate(disk.path, disk.size_bytes)


def _user(request: Request) -> str:
    return request.peer.removeprefix(USER_PREFIX)


def _disks(user: str) -> list[Disk]:
    try:
        files = os.listdir(directory_of(user))
    except FileNotFoundError:
        return []
    split = (name.rpartition(".") for name in sorted(files))
    return [Disk(user, name, int(size)) for name, _, size in split]


def _used(disk: Disk) -> int:
    return os.stat(disk.path).st_blocks * 512


if __name__ == "__main__":
    os.umask(0o077)
    DiskDriver(Core()).run()
