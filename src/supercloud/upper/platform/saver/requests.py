"""What the agent asks of a saver and what it answers: JSON lines, each ``{"kind": value}``.

A take::

    -> take      Take
    <- ready     Ready     whatever needs no pause is done: base written, layer copied ahead
    -> capture   {}        the environment stands still now
    <- captured  Captured
    -> write     {}        it goes on; ``directory`` has all that its engine wrote
    <- taken     Taken

A restore::

    -> restore   Restore
    <- found     Found     authentic; is it one that can run here?
    -> fetch     {}
    <- fetched   {}        everything read and verified

and at any time ``<- failed`` with an error as ``model.errors.to_wire`` makes it. The end of its
input ends a saver.
"""

from typing import Annotated, Any, Final

from supercloud.model.records import dataclass, field
from supercloud.wire.checkpoints import CheckpointTaken, Count, Head, Sequence, StoreAccess
from supercloud.wire.codec import Limit, Name, Text

MAX_LINE_BYTES: Final = 1 << 20
RAM_NAME: Final = "supercloud-ram"
"""Of the memory file of a VM that can be checkpointed, as it is in /proc/PID/maps."""

MEMORY, DEVICE, FILES = "memory", "device", "fs"
"""Names of parts: a VM's RAM or CRIU's images; devices' state; a container's layer."""

Path = Annotated[str, Limit(max_length=4096)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """A checkpoint of ``ee`` after ``head``.

    A VM has ``pid`` (QEMU's) and ``base``, what its pages have been tracked since (``Ready``); a
    container has ``layer`` and the first id of its owners, ``owner``. In ``directory`` are
    ``device`` and ``disk-NAME`` of a VM, ``criu/`` of a container, when ``write`` is asked for.
    """

    ucloud: Name
    ee: Name
    engine: Name
    store: StoreAccess
    head: Head | None = None
    directory: Path
    details: dict[str, Text] = field(default_factory=dict)
    pid: Annotated[int, Limit(ge=0)] = 0
    base: Text = ""
    layer: Path = ""
    owner: Annotated[int, Limit(ge=0)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """``base`` names what increments lie over from now on; ``is_new``: it was written just now."""

    base: Text = ""
    is_new: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """What was copied while the environment stood still."""

    dirty_bytes: Count = 0
    files_bytes: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """``details`` are added to those of the take."""

    details: dict[str, Text] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """A checkpoint to be read: RAM into the inherited descriptor ``ram``, the rest into files."""

    ucloud: Name
    ee: Name
    store: StoreAccess
    head: Head
    sequence: Sequence | None = None
    directory: Path
    ram: int = -1
    layer: Path = ""
    owner: Annotated[int, Limit(ge=0)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An authentic checkpoint: who made it, how, and the sizes of its parts."""

    engine: str
    sequence: Sequence
    parts: dict[str, Count]
    details: dict[str, Text]


KINDS: Final[dict[str, type[Any]]] = {
    "take": Take,
    "ready": Ready,
    "captured": Captured,
    "write": Write,
    "taken": CheckpointTaken,
    "restore": Restore,
    "found": Found,
}
"""Those that carry a value; the others are empty."""
