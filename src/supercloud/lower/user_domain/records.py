"""What this domain remembers of its platforms across a restart: one file each."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from supercloud.model.states import MACHINE, step
from supercloud.wire.codec import decode, encode, replace
from supercloud.wire.messages import PlatformSpec, PlatformStatus

_STORED = (
    "accelerator", "created_s", "state", "reason", "address", "first_port", "template",
)  # fmt: skip


@dataclass(slots=True)
class Record:
    """A platform. ``spec`` has no config disk: that holds a token and is not kept.

    ``template`` is the key of the one that it was started from.
    """

    spec: PlatformSpec
    accelerator: str
    created_s: float
    state: str = "creating"
    reason: str = ""
    address: str = ""
    first_port: int = 0
    template: str = ""

    def status(self) -> PlatformStatus:
        """As the control plane sees it."""
        spec = self.spec
        return PlatformStatus(
            name=spec.name, state=self.state, image=spec.image, cpus=spec.cpus,
            memory_bytes=spec.memory_bytes, scratch_bytes=spec.scratch_bytes,
            address=self.address, first_port=self.first_port, ports=spec.ports,
            accelerator=self.accelerator, created_s=self.created_s, reason=self.reason,
            tag=spec.tag, spec_sha256=fingerprint(spec),
            started_from="memory" if self.template else "boot",
        )  # fmt: skip

    def go(self, state: str, reason: str = "") -> None:
        """To another state, if the table of machines has that; BadState."""
        self.state = step(MACHINE, self.state, state)
        self.reason = reason


def fingerprint(spec: PlatformSpec) -> str:
    """Names a spec without its config disk."""
    plain = encode(replace(spec, config_base64=""))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class Records:
    """All of them, by name, in ``directory``."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.by_name: dict[str, Record] = {}
        for file in sorted(os.listdir(directory)):
            if file.endswith(".json"):
                record = _read(f"{directory}/{file}")
                self.by_name[record.spec.name] = record

    def put(self, record: Record) -> None:
        """Add or replace, on disk when it returns."""
        stored = {name: getattr(record, name) for name in _STORED}
        stored["spec"] = encode(replace(record.spec, config_base64=""))
        path = self._path(record.spec.name)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(stored, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
        self.by_name[record.spec.name] = record

    def remove(self, name: str) -> None:
        """Forget."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))
        self.by_name.pop(name, None)

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}.json"


def _read(path: str) -> Record:
    with open(path, encoding="utf-8") as file:
        stored: dict[str, Any] = json.load(file)
    spec = decode(PlatformSpec, stored.pop("spec"), "spec", ignore_unknown=True)
    return Record(spec=spec, **stored)
