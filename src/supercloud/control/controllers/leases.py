"""Until when a mirror may answer, as its owner must assume it.

A host counts a lease from a stamp of its own clock that it told before; here it is counted from
when that stamp was received, which is later. What an earlier life of the control plane granted was
granted before this one began. So no clocks are compared, and nothing has to be written down.
"""

import time
from dataclasses import dataclass
from typing import Final

from supercloud.control.documents import VolumeDocument
from supercloud.wire.mirrors import MirrorStatus, VolumeLease, Written

DRIFT: Final = 1.1
"""How much faster our clock may go than a host's."""


@dataclass(slots=True)
class _Lease:
    """Of one generation. ``written`` is to be confirmed with the next renewal."""

    generation: int
    stamp: int
    received_s: float
    written: tuple[Written, ...] = ()


class Leases:
    """Of all volumes that this control plane lets be used."""

    def __init__(self, valid_s: float) -> None:
        """Each is granted for ``valid_s`` seconds."""
        self._valid_s = valid_s
        self._began_s = time.monotonic()
        self._held: dict[tuple[str, str], _Lease] = {}
        self._until_s: dict[tuple[str, str], float] = {}

    def heard(
        self, volume: VolumeDocument, status: MirrorStatus, written: tuple[Written, ...] = ()
    ) -> None:
        """The host has told a stamp; ``written`` is in the record by now."""
        name = (volume.ucloud, volume.name)
        self._held[name] = _Lease(status.generation, status.stamp, time.monotonic(), written)

    def next(self, volume: VolumeDocument) -> VolumeLease:
        """What to ask of the host next; from now on that counts as granted."""
        name = (volume.ucloud, volume.name)
        held = self._held.get(name)
        if held is None or held.generation != volume.generation:
            return VolumeLease(name=volume.name, generation=volume.generation)
        until_s = held.received_s + self._valid_s * DRIFT
        self._until_s[name] = max(until_s, self._until_s.get(name, 0.0))
        return VolumeLease(
            name=volume.name,
            generation=volume.generation,
            stamp=held.stamp,
            valid_ms=int(self._valid_s * 1000),
            written=list(held.written),
        )

    def left_s(self, volume: VolumeDocument) -> float:
        """Seconds until whatever was granted is over for certain; 0 when it is."""
        name = (volume.ucloud, volume.name)
        until_s = self._until_s.get(name, self._began_s + self._valid_s * DRIFT)
        return max(0.0, until_s - time.monotonic())

    def drop(self, volume: VolumeDocument) -> None:
        """Its mirror is over."""
        self._held.pop((volume.ucloud, volume.name), None)
