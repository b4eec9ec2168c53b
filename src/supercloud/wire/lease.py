"""What a machine's uplink is to be: as DHCP says it, but a clone is told, which is quicker."""

from typing import Annotated, Final

from supercloud.model.records import dataclass
from supercloud.wire.codec import Limit

_BYTE: Final = r"(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
_IPV4: Final = rf"({_BYTE}\.){{3}}{_BYTE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """``address`` with its prefix; ``resolvers`` are none where the host knows none."""

    address: Annotated[str, Limit(pattern=rf"{_IPV4}/(3[0-2]|[12]?[0-9])")]
    gateway: Annotated[str, Limit(pattern=_IPV4)]
    resolvers: Annotated[list[Annotated[str, Limit(pattern=_IPV4)]], Limit(max_length=3)]
