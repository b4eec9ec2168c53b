"""What documents say of checkpoints, and of where an EE is in the network; see ``documents``."""

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

CheckpointsOf = Literal["environment", "platform"]


@dataclass(slots=True, kw_only=True)
class Place:
    """An EE's place in its network, whatever platform it is on; addresses are IPv4."""

    network: str
    address: str
    prefix_length: int
    gateway: str
    mac: str


def place_of(one: Place) -> Place:
    """Only that, of whatever has more."""
    return Place(
        network=one.network,
        address=one.address,
        prefix_length=one.prefix_length,
        gateway=one.gateway,
        mac=one.mac,
    )


@dataclass(slots=True, kw_only=True)
class Restore:
    """The decision that an EE or a platform starts anew from checkpoint ``sequence`` of its own.

    ``number`` counts such decisions: each makes it another one, once. ``mark`` is of this one
    alone, over all lives of its U-Cloud.
    """

    number: int
    sequence: int
    mark: str = ""


@dataclass(slots=True, kw_only=True)
class KeptCheckpoint:
    """A checkpoint that can be restored; the figures are those of ``wire.checkpoints``.

    ``shape`` names what it is of: only the same can go on from it. An EE's comes with its ``place``
    in the network, a platform's with the pin of its key, ``pin``, and its ``image``. ``snapshots``
    are those of the volumes that the EE wrote to, or that the platform had, by volume, of the same
    instant; ``slots`` where it had them.
    """

    sequence: int
    root: str
    engine: str
    taken_ms: int
    pause_ms: float
    base: bool
    memory_bytes: int
    dirty_bytes: int
    disk_bytes: int
    new_bytes: int
    details: dict[str, str]
    shape: str
    provider: str
    host: str
    place: Place | None = None
    pin: str = ""
    image: str = ""
    snapshots: dict[str, str] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class TakeTask:
    """A checkpoint that the user asked for; ``done`` with its ``sequence`` or an ``error``."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    done: bool = False
    sequence: int = 0
    error: dict[str, Any] | None = None
