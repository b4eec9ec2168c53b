"""What this domain remembers of its platforms across a restart: one file each."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Final

from supercloud.lower.user_domain.files import Files
from supercloud.model.states import MACHINE, step
from supercloud.wire.codec import decode, encode, replace
from supercloud.wire.host import PlatformSpec, PlatformStatus

_STORED = (
    "accelerator", "created_s", "state", "reason", "address", "first_port", "template",
    "restored", "heads", "cut_off",
)  # fmt: skip
KEPT_HEADS: Final = 8


@dataclass(slots=True)
class Record:
    """A platform. ``spec`` has no config disk: that holds a token and is not kept.

    ``template`` is the key of the one that it was started from, ``restored`` the checkpoint (of
    whom, and its sequence). ``heads`` are of checkpoints that were taken of it since, newest last:
    an increment may lie over any of them. ``cut_off``: its link died, which nothing makes again.
    ``awaits_template`` is of this process alone.
    """

    spec: PlatformSpec
    accelerator: str
    created_s: float
    state: str = "creating"
    reason: str = ""
    address: str = ""
    first_port: int = 0
    template: str = ""
    restored: str = ""
    heads: list[list[Any]] = field(default_factory=list)
    cut_off: bool = False
    awaits_template: bool = False

    def status(self) -> PlatformStatus:
        """As the control plane sees it."""
        spec = self.spec
        return PlatformStatus(
            name=spec.name, state=self.state, image=spec.image, cpus=spec.cpus,
            memory_bytes=spec.memory_bytes, scratch_bytes=spec.scratch_bytes,
            address=self.address, first_port=self.first_port, ports=spec.ports,
            accelerator=self.accelerator, created_s=self.created_s, reason=self.reason,
            tag=spec.tag, spec_sha256=fingerprint(spec),
            started_from=self.started_from, cut_off=self.cut_off,
        )  # fmt: skip

    @property
    def started_from(self) -> str:
        """boot, memory or checkpoint."""
        if self.restored:
            return "checkpoint"
        return "memory" if self.template else "boot"

    def go(self, state: str, reason: str = "") -> None:
        """To another state, if the table of machines has that; BadState."""
        self.state = step(MACHINE, self.state, state)
        self.reason = reason


def fingerprint(spec: PlatformSpec) -> str:
    """Names a spec without its config disk, and without what it goes on from."""
    plain = encode(bare(spec))
    del plain["restore"]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def bare(spec: PlatformSpec) -> PlatformSpec:
    """Without what must not be kept: a token, and the secrets of a checkpoint's store."""
    return replace(spec, config_base64="", restore=None)


class Records:
    """All of them, by name, in ``directory``."""

    def __init__(self, directory: str) -> None:
        self._files = Files(directory)
        read = map(_record, self._files.read())
        self.by_name: dict[str, Record] = {record.spec.name: record for record in read}

    def put(self, record: Record) -> None:
        """Add or replace, on disk when it returns."""
        stored = {name: getattr(record, name) for name in _STORED}
        stored["spec"] = encode(bare(record.spec))
        self._files.put(record.spec.name, stored)
        self.by_name[record.spec.name] = record

    def remove(self, name: str) -> None:
        """Forget."""
        self._files.remove(name)
        self.by_name.pop(name, None)


def _record(stored: dict[str, Any]) -> Record:
    spec = decode(PlatformSpec, stored.pop("spec"), "spec", ignore_unknown=True)
    return Record(spec=spec, **stored)
