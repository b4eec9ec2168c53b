"""Image references: what a user writes to name a container image."""

import ipaddress
import re
from dataclasses import dataclass

from supercloud.model.errors import Invalid

_LAYOUT = "oci"
_ARCHIVE = "docker-archive"
_MAX_CHARS = 4096
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
_REMOTE = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<name>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
HINT = "one of oci:DIR[:tag], docker-archive:FILE, docker://host[:port]/name[:tag], name[:tag]"


@dataclass(frozen=True)
class Reference:
    """What a reference names.

    ``transport`` is ``oci``, ``docker-archive`` or ``docker``; ``place`` a path, or ``host/name``
    of a registry; ``tag`` may be empty; ``digest`` is of a remote manifest.
    """

    text: str
    transport: str
    place: str
    tag: str = ""
    digest: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether it names a registry on this machine, where plain HTTP does no harm."""
        host = self.place.partition("/")[0]
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def parse_reference(text: str) -> Reference:
    """Read a reference; raises ``Invalid``."""
    if not text or len(text) > _MAX_CHARS or not text.isprintable():
        raise Invalid("an image reference is 1 to 4096 printable characters", hint=HINT)
    transport, colon, rest = text.partition(":")
    if colon and transport == _LAYOUT:
        return _layout(text, rest)
    if colon and transport == _ARCHIVE:
        return Reference(text, _ARCHIVE, _path(text, rest))
    return _remote(text, text.removeprefix("docker://"))


def _layout(text: str, rest: str) -> Reference:
    path, colon, tag = rest.rpartition(":")
    if colon and _TAG.fullmatch(tag):
        return Reference(text, _LAYOUT, _path(text, path), tag)
    return Reference(text, _LAYOUT, _path(text, rest))


def _path(text: str, path: str) -> str:
    if not path:
        raise Invalid("the image reference names no path", where=text, hint=HINT)
    return path


def _remote(text: str, rest: str) -> Reference:
    match = _REMOTE.fullmatch(rest)
    if not match:
        raise Invalid("this is not an image reference", where=text, hint=HINT)
    host, name = match["host"] or "", match["name"]
    # As everywhere: the first part is a host only when it looks like one.
    if host and not (set(".:[") & set(host)) and host != "localhost":
        if not re.fullmatch(_COMPONENT, host):
            raise Invalid("an image's name is in lower case", where=text, hint=HINT)
        host, name = "docker.io", f"{host}/{name}"
    elif not host:
        host = "docker.io"
    if host == "docker.io" and "/" not in name:
        name = f"library/{name}"
    tag = match["tag"] or ("" if match["digest"] else "latest")
    return Reference(text, "docker", f"{host}/{name}", tag, match["digest"] or "")
