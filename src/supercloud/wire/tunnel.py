"""From host to host of one U-Cloud: who is reached where, and what may be asked of a host.

A user domain dials another one through that one's front door. Both show certificates of the
U-Cloud in the role ``host``. The one call on such a connection is ``tunnel.open``; after its answer
the connection is raw, and its bytes are those of what was asked for. What a host lets others have
is the control plane's to say: ``tunnel.apply`` for the object store, ``volume.serve`` for replicas.
"""

from typing import Annotated, Literal

from supercloud.model.records import dataclass, field
from supercloud.wire.codec import Limit, Name
from supercloud.wire.messages import Empty, Method, Port

MAX_HOSTS = 256

HostAddress = Annotated[str, Limit(min_length=2, max_length=300)]

Kind = Literal["objects", "replica"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHost:
    """Another host of the U-Cloud.

    ``name`` is in its certificate, ``user`` is what its front door knows the U-Cloud by, and
    ``address`` is numeric.
    """

    name: Name
    user: Name
    address: HostAddress
    port: Port


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelApply:
    """What a host asks of others, and what it lets them have.

    ``objects_from``: where the object store is, unless it is here; ``objects_to``: the hosts that
    may reach the one that is here.
    """

    objects_from: PeerHost | None = None
    objects_to: Annotated[list[Name], Limit(max_length=MAX_HOSTS)] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelOpen:
    """Be joined to something of the other host. ``volume`` and ``generation`` are of a replica.

    ``objects``: a connection to the S3 port, which speaks TLS. ``replica``: NBD to the protected
    device of a volume. Denied when the control plane did not say so.
    """

    kind: Kind
    volume: Annotated[str, Limit(pattern=r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?")] = ""
    generation: Annotated[int, Limit(ge=0, le=1 << 62)] = 0


TUNNEL = {
    method.name: method
    for method in (Method("tunnel.open", TunnelOpen, Empty, doc="then raw: what was asked for"),)
}
