"""Machines out of memory: what a template is of, how QEMU saves one, and how it starts a clone.

A machine whose agent waits for an identity is stopped; its RAM is a memory object that QEMU maps
shared, so all that is left to save is the devices' state (capability ``x-ignore-shared``: some
hundred KiB in some ten milliseconds). Both are sealed and measured. A clone maps that RAM
privately, loads the state and goes on where the template stopped.

A template is good for machines of exactly its inputs: :func:`key_of` names them all, so that a
change of any of them is another template.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from supercloud.lower.vmm.machine import STATE_SET, Descriptors, Machine, command_line
from supercloud.wire.qmp import Qmp

FORMAT: Final = 2
MAX_STATE_BYTES: Final = 32 << 20
NOBODY_UPLINK, NOBODY_LINK = "02:5c:00:00:00:00", "02:5c:77:00:00:00"
_STATE_URI: Final = f"file:/dev/fdset/{STATE_SET}"
_CAPABILITIES: Final = ({"capability": "x-ignore-shared", "state": True},
                        {"capability": "events", "state": True})  # fmt: skip

Failed = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All that a template depends on. ``runtime_sha256`` has in it QEMU, firmware and our code.

    ``scratch_bytes`` is among them since a guest learns a disk's size when it finds the disk.
    ``content`` names what is prepared in it; platforms of the same shape can do with any.
    """

    image: str
    runtime_sha256: str
    kernel: str
    accelerator: str
    cpus: int
    memory_bytes: int
    scratch_bytes: int
    content: str = ""

    @property
    def shape(self) -> "Inputs":
        """All but what is prepared."""
        return replace(self, content="")


def key_of(inputs: Inputs) -> str:
    """The template's name: 64 hexadecimal digits over its inputs and QEMU's command line."""
    numbers = range(3, 3 + len(Descriptors.__slots__))
    given = Descriptors(**dict(zip(Descriptors.__slots__, numbers, strict=True)))
    named = {
        "format": FORMAT,
        "inputs": asdict(inputs),
        "machine": command_line(machine_of(inputs), given),
    }
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def machine_of(inputs: Inputs) -> Machine:
    """The machine that becomes the template: nobody's."""
    return Machine(
        name="template",
        cpus=inputs.cpus,
        memory_bytes=inputs.memory_bytes,
        accelerator="kvm" if inputs.accelerator == "kvm" else "tcg",
        uplink_mac=NOBODY_UPLINK,
        link_mac=NOBODY_LINK,
        start="template",
        scratch_bytes=inputs.scratch_bytes,
    )


class Sequence:
    """QMP commands one after the other, the last of which ends with an event MIGRATION."""

    def __init__(self, qmp: Qmp, done: Callable[[], None], failed: Failed) -> None:
        self._qmp, self._done, self._failed = qmp, done, failed
        self._migrating = False

    def run(self, *commands: tuple[str, dict[str, Any]]) -> None:
        """Each when the one before is answered; an error ends it."""
        (name, arguments), *rest = commands
        self._migrating = not rest

        def answered(answer: dict[str, Any]) -> None:
            if "error" in answer:
                self._failed(f"{name}: {answer['error'].get('desc', 'refused')}")
            elif rest:
                self.run(*rest)

        self._qmp.command(name, arguments, answered)

    def migration(self, status: str) -> None:
        """An event MIGRATION came."""
        if self._migrating and status in ("completed", "failed"):
            self._migrating = False
            if status == "completed":
                self._done()
            else:
                self._failed("QEMU could not save or load the devices' state")


_SET: Final = ("migrate-set-capabilities", {"capabilities": list(_CAPABILITIES)})


def save(qmp: Qmp, done: Callable[[], None], failed: Failed) -> Sequence:
    """Stop the machine and write its devices' state to the file that it was given."""
    sequence = Sequence(qmp, done, failed)
    sequence.run(("stop", {}), _SET, ("migrate", {"uri": _STATE_URI}))
    return sequence


def load(qmp: Qmp, done: Callable[[], None], failed: Failed) -> Sequence:
    """Load the devices' state into a machine that waits for it; it is left stopped."""
    sequence = Sequence(qmp, done, failed)
    sequence.run(_SET, ("migrate-incoming", {"uri": _STATE_URI}))
    return sequence
