"""Which instance of this machine has which uids and ports: a file that all instances share.

An entry stays as long as its state directory does, so that an instance comes back with the uids
that own its files.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from supercloud.model.errors import NoResources

PATH: Final = "/var/lib/supercloud-host/instances.json"
UIDS_EACH: Final = 1024
"""Domains get one half as uids, the owners of their user namespaces another: 2048 an instance."""
_FIRST_UID: Final = 2_000_000
_FIRST_PORT: Final = 20_000
_PORTS_EACH: Final = 1024
MAX_INSTANCES: Final = 256
_PORT_RANGES: Final = 12  # below the ports that kernels hand out themselves (32768..)


@dataclass(frozen=True, slots=True)
class Share:
    """One instance's part of the machine."""

    number: int
    state: str

    @property
    def first_uid(self) -> int:
        """The first of ``2 * UIDS_EACH``."""
        return _FIRST_UID + 2 * UIDS_EACH * self.number

    @property
    def last_uid(self) -> int:
        """For the probe, before there are domains."""
        return self.first_uid + UIDS_EACH - 1

    @property
    def last_owner(self) -> int:
        """The owner of the probe's user namespace."""
        return self.last_uid + UIDS_EACH

    @property
    def ports(self) -> tuple[int, int]:
        """First and last port to publish on, unless it is told others.

        Many instances share ranges: a port is only handed out when it is free.
        """
        first = _FIRST_PORT + _PORTS_EACH * (self.number % _PORT_RANGES)
        return first, first + _PORTS_EACH - 1


def claim(instance: str, state: str, path: str = PATH) -> Share:
    """The instance's share, allotted at its first start. NoResources when there are too many."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with _locked(path):
        shares = {name: share for name, share in _load(path).items() if os.path.isdir(share.state)}
        known = shares.get(instance)
        number = known.number if known else _free_number(shares)
        shares[instance] = Share(number, state)
        _save(path, shares)
        return shares[instance]


def _free_number(shares: dict[str, Share]) -> int:
    taken = {share.number for share in shares.values()}
    for number in range(MAX_INSTANCES):
        if number not in taken:
            return number
    raise NoResources(
        f"this machine has {MAX_INSTANCES} instances already",
        hint="remove the state directories of those that you do not need",
        details={"instances": sorted(shares)},
    )


def _load(path: str) -> dict[str, Share]:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
        return {name: Share(**entry) for name, entry in found["instances"].items()}
    return {}


def _save(path: str, shares: dict[str, Share]) -> None:
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump({"version": 1, "instances": {n: asdict(s) for n, s in shares.items()}}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
