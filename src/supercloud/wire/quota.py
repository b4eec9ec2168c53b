"""What a user may use of a host; apart from the other messages for small programs."""

from typing import Annotated

from supercloud.model.records import dataclass
from supercloud.wire.codec import Limit

Bytes = Annotated[int, Limit(ge=0, le=1 << 50)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What a user may use of a host. ``cpu_permille`` 1000 is one processor."""

    cpu_permille: Annotated[int, Limit(ge=10, le=1_000_000)] = 2000
    memory_bytes: Bytes = 4 << 30
    disk_bytes: Bytes = 32 << 30
    vms: Annotated[int, Limit(ge=0, le=1000)] = 4
