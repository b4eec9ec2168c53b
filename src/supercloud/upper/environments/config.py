"""What a container image says of the process to run in it."""

from dataclasses import dataclass
from typing import Any

from supercloud.model.errors import Invalid

_MAX_ITEMS = 1024
_MAX_CHARS = 128 << 10


@dataclass(frozen=True)
class ImageConfig:
    """The OCI image's ``config``, validated.

    ``env`` holds ``NAME=VALUE``; ``exposed_ports`` pairs of port and ``tcp`` or ``udp``.
    """

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    exposed_ports: tuple[tuple[int, str], ...] = ()
    stop_signal: str = ""

    def oci(self) -> dict[str, Any]:
        """As the OCI image specification writes it."""
        return {
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "Env": list(self.env),
            "WorkingDir": self.workdir,
            "User": self.user,
            "ExposedPorts": {f"{port}/{protocol}": {} for port, protocol in self.exposed_ports},
            "StopSignal": self.stop_signal,
        }


def parse_config(untrusted: object, *, where: str) -> ImageConfig:
    """Read an image's ``config`` object, which may be missing. Raises ``Invalid``."""
    if untrusted is None:
        return ImageConfig()
    if not isinstance(untrusted, dict):
        raise Invalid("the image's config is not an object", where=where)
    ports = untrusted.get("ExposedPorts") or {}
    if not isinstance(ports, dict) or len(ports) > _MAX_ITEMS:
        raise Invalid("the image's ExposedPorts is not an object", where=where)
    return ImageConfig(
        entrypoint=_texts(untrusted, "Entrypoint", where),
        cmd=_texts(untrusted, "Cmd", where),
        env=_environment(untrusted, where),
        workdir=_text(untrusted.get("WorkingDir") or "", "WorkingDir", where),
        user=_text(untrusted.get("User") or "", "User", where),
        exposed_ports=tuple(sorted(_port(name, where) for name in ports)),
        stop_signal=_text(untrusted.get("StopSignal") or "", "StopSignal", where),
    )


def _environment(untrusted: dict[str, Any], where: str) -> tuple[str, ...]:
    items = _texts(untrusted, "Env", where)
    if any(item.startswith("=") or "=" not in item for item in items):
        raise Invalid("the image's Env has an item that is not NAME=VALUE", where=where)
    return items


def _texts(untrusted: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    items = untrusted.get(name) or []
    if not isinstance(items, list) or len(items) > _MAX_ITEMS:
        raise Invalid(f"the image's {name} is not a list of at most {_MAX_ITEMS}", where=where)
    return tuple(_text(item, name, where) for item in items)


def _text(untrusted: object, name: str, where: str) -> str:
    if not isinstance(untrusted, str) or len(untrusted) > _MAX_CHARS or "\0" in untrusted:
        raise Invalid(f"the image's {name} holds something that is not a text", where=where)
    return untrusted


def _port(untrusted: str, where: str) -> tuple[int, str]:
    number, _, protocol = untrusted.partition("/")
    protocol = protocol or "tcp"
    known = protocol in {"tcp", "udp", "sctp"}
    if not known or not number.isascii() or not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise Invalid(f"the image exposes {untrusted[:64]!r}, which is no port", where=where)
    return int(number), protocol
