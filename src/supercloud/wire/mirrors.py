"""Messages about volumes that are kept on several hosts: control plane -> user domain.

Each replica is a volume of its own at its host: opened, with its own key and seal, and served to
one other host (``Shared``). The *source's* host has the mirror over all of them (``Mirror``) and
the block service on top of it. ``volume.serve`` makes the mirror, which answers nothing before it
has a lease; asked again once it has one, it lets the volume be used. The lease, and the record of
which replicas are in sync, are the control plane's: what ``volume.lease`` answers is to be written
down before the next one confirms it. Who must keep to what: decisions 0013 and 0015.
"""

from typing import Annotated, Literal

from supercloud.model.records import dataclass, field
from supercloud.wire.codec import Limit, Name
from supercloud.wire.tunnel import PeerHost

MOST_REPLICAS = 3
MAX_VALID_MS = 60_000

Generation = Annotated[int, Limit(ge=1, le=1 << 62)]
Count = Annotated[int, Limit(ge=0, le=1 << 62)]
Standing = Literal["in_sync", "joining", "failing", "stale", "syncing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One of a mirror's; without a ``peer`` it is the device that is here.

    ``in_sync``: the record has it so. ``kept``: since then its device was not ended but in order.
    ``there``: its host serves it to us in this generation, as far as the control plane knows.
    """

    replica: Name
    in_sync: bool
    kept: bool
    there: bool = True
    peer: PeerHost | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """What the source is to serve. ``clean``: those in sync are equal; ``new``: and empty.

    ``all_ended``: no replica that is in sync was kept, as when all hosts lost their power; what was
    not flushed is lost then. Otherwise it begins only with one that was kept.
    """

    generation: Generation
    replicas: Annotated[list[Replica], Limit(min_length=1, max_length=MOST_REPLICAS)]
    clean: bool = False
    new: bool = False
    all_ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A replica: ``host`` may have it over a tunnel, once, as one of that generation's mirror."""

    host: Name
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """``turn`` of a replica is in the record: it is stale, or in sync."""

    replica: Name
    turn: Count
    in_sync: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeLease:
    """Answers may be given for ``valid_ms`` from ``stamp`` on, which the host said before.

    0: only what is written is told, and the state is asked for.
    """

    name: Name
    generation: Generation
    stamp: Count = 0
    valid_ms: Annotated[int, Limit(ge=0, le=MAX_VALID_MS)] = 0
    written: Annotated[list[Written], Limit(max_length=MOST_REPLICAS)] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRejoin:
    """A replica is served to us again, by ``peer``: it gets what it lacks."""

    name: Name
    generation: Generation
    replica: Name
    peer: PeerHost


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFence:
    """A newer generation exists, or will: a mirror of an older one never answers again."""

    name: Name
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """``failing`` and ``joining`` wait for ``turn`` to be written down."""

    replica: str
    standing: Standing
    turn: Count = 0
    connected: bool = False
    lacks_bytes: Count = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorStatus:
    """``closed_by`` is why nothing is answered now, or empty.

    ``clean``, of one that was closed: all replicas that are in sync were equal then.
    """

    generation: Count
    stamp: Count = 0
    left_ms: Count = 0
    closed_by: str = ""
    clean: bool = False
    replicas: list[ReplicaStatus] = field(default_factory=list)
