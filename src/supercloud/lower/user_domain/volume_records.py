"""What this domain remembers of its volumes across a restart: one file each, never a key."""

from dataclasses import dataclass, field
from typing import Any

from supercloud.lower.user_domain.files import Files
from supercloud.model.states import VOLUME, step
from supercloud.wire.codec import decode, encode
from supercloud.wire.mirrors import Shared
from supercloud.wire.volumes import Seal, VolumeSpec, VolumeStatus

_KEPT = ("state", "reason", "platform", "slot", "mode", "used", "mirrored", "streamed", "copied")


@dataclass(slots=True)
class Volume:
    """One volume. ``used``: it was served once, so that there is something in it.

    ``wanted`` is what it becomes when it is served, in the epoch that was ``promised``, as it was
    opened; a restart in between forgets them, and it is opened again. ``mirrored``: it is the
    source of a mirror. ``shared``: another host's mirror may have its device, once: ``streamed``.
    ``last`` is the seal with which it was closed in order, until it is opened again. ``copied`` is
    the number of the last copy into it that is done.
    """

    spec: VolumeSpec
    state: str = "closed"
    reason: str = ""
    platform: str = ""
    slot: int = 0
    mode: str = ""
    used: bool = False
    mirrored: bool = False
    shared: Shared | None = None
    streamed: bool = False
    copied: int = 0
    last: Seal = field(default_factory=Seal)
    wanted: VolumeSpec | None = None
    promised: int = 0

    def go(self, state: str, reason: str = "") -> None:
        """To another state, if the table of volumes has that; BadState."""
        self.state, self.reason = step(VOLUME, self.state, state), reason
        if state != "attached":
            self.platform, self.slot, self.mode = "", 0, ""
        if state == "closed":
            self.mirrored, self.shared, self.streamed = False, None, False
        elif state == "opened":
            self.last = Seal()

    @property
    def in_use(self) -> bool:
        """Whether the block service has it."""
        return self.state in ("served", "attached") and self.shared is None

    def status(self, **more: Any) -> VolumeStatus:
        """As the control plane sees it."""
        spec, reason = self.spec, more.pop("reason", "") or self.reason
        return VolumeStatus(
            name=spec.name, state=self.state, size_bytes=spec.size_bytes, format=spec.format,
            platform=self.platform, slot=self.slot, mode=self.mode, reason=reason,
            tag=spec.tag, shared=self.shared, copied=self.copied, **more,
        )  # fmt: skip


class VolumeRecords:
    """All of them, by name, in ``directory``."""

    def __init__(self, directory: str) -> None:
        self._files = Files(directory)
        read = map(_volume, self._files.read())
        self.by_name: dict[str, Volume] = {volume.spec.name: volume for volume in read}

    def put(self, volume: Volume) -> None:
        """Add or replace, on disk when it returns."""
        stored = {name: getattr(volume, name) for name in _KEPT}
        shared = encode(volume.shared) if volume.shared else None
        stored |= {"spec": encode(volume.spec), "shared": shared, "last": encode(volume.last)}
        self._files.put(volume.spec.name, stored)
        self.by_name[volume.spec.name] = volume

    def remove(self, name: str) -> None:
        """Forget."""
        self._files.remove(name)
        self.by_name.pop(name, None)


def _volume(stored: dict[str, Any]) -> Volume:
    spec = decode(VolumeSpec, stored.pop("spec"), "spec", ignore_unknown=True)
    shared, last = stored.pop("shared", None), stored.pop("last", {})
    return Volume(
        spec=spec,
        last=decode(Seal, last, "last", ignore_unknown=True),
        shared=decode(Shared, shared, "shared", ignore_unknown=True) if shared else None,
        **stored,
    )
