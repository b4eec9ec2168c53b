"""Who somebody is in a U-Cloud: the URI and DNS names that certificates carry. Standard library."""

import re
from dataclasses import dataclass
from typing import Final

from supercloud.model.errors import Invalid

DOMAIN: Final = "supercloud.internal"
CONTROL: Final = "control"
HOST: Final = "host"
PLATFORM: Final = "platform"
SERVICE: Final = "service"
ROLES: Final = frozenset({CONTROL, HOST, PLATFORM, SERVICE})

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_LABEL_ONLY = re.compile(_LABEL)
_URI = re.compile(rf"supercloud://({_LABEL})/(control|host|platform|service)/({_LABEL})")


@dataclass(frozen=True, slots=True)
class Identity:
    """``ucloud`` and ``name`` are RFC 1123 labels, ``role`` one of ``ROLES``."""

    ucloud: str
    role: str
    name: str

    def __post_init__(self) -> None:
        check_label(self.ucloud, "ucloud")
        check_label(self.name, "name")
        if self.role not in ROLES:
            raise Invalid(f"no such role: {self.role!r:.80}", where="role")

    @property
    def uri(self) -> str:
        """The URI subject alternative name."""
        return f"supercloud://{self.ucloud}/{self.role}/{self.name}"

    @property
    def dns(self) -> str:
        """The DNS subject alternative name; may pass the 253 characters that resolvers take."""
        return f"{self.name}.{self.role}.{self.ucloud}.{DOMAIN}"

    def __str__(self) -> str:
        return self.uri


def check_label(untrusted: str, where: str) -> str:
    """``untrusted`` when it is an RFC 1123 label in lower case; Invalid otherwise."""
    if not _LABEL_ONLY.fullmatch(untrusted):
        raise Invalid(f"{untrusted!r:.80} is no name (a-z, 0-9, -; at most 63)", where=where)
    return untrusted


def parse_uri(untrusted: str) -> Identity:
    """The identity in a URI name; Invalid when it is not one of ours."""
    match = _URI.fullmatch(untrusted)
    if match is None:
        raise Invalid(f"{untrusted!r:.120} is not supercloud://UCLOUD/ROLE/NAME")
    return Identity(*match.groups())


def control_of(ucloud: str) -> Identity:
    """The control plane's end of everything in ``ucloud``."""
    return Identity(ucloud, CONTROL, CONTROL)


def user_server_name(user: str) -> str:
    """The SNI by which a host's front door finds the domain of ``user``."""
    return f"{check_label(user, 'user')}.user.{DOMAIN}"
