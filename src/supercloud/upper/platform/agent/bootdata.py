"""What the platform was told at boot: JSON on the config disk (label ``config-2``)."""

import contextlib
import json
import os
from typing import Annotated, Any, Final, Literal

from supercloud.model.errors import Invalid, NotFound
from supercloud.model.records import dataclass
from supercloud.upper.platform.agent import paths, syscalls
from supercloud.upper.platform.agent.iso9660 import Iso
from supercloud.wire.codec import Limit, Name, decode

VERSION = 1
MAX_BYTES = 1 << 20
_USER_DATA = "openstack/latest/user_data"
_META_DATA = "openstack/latest/meta_data.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BootData:
    """``endpoints`` are rendezvous points, ``address:port``, tried in turn."""

    version: Annotated[int, Limit(ge=VERSION, le=VERSION)]
    ucloud: Name
    platform: Name
    token: Annotated[str, Limit(min_length=32, max_length=128)]
    ca_pem: Annotated[str, Limit(max_length=65536)]
    server_name: Annotated[str, Limit(max_length=253, pattern=r"[a-z0-9.-]+")]
    endpoints: Annotated[
        list[Annotated[str, Limit(max_length=300, pattern=r"[^\s:]+:[0-9]{1,5}")]],
        Limit(min_length=1, max_length=16),
    ]
    uplink: Literal["dhcp", "none"] = "dhcp"


EXAMPLE: Final = {
    "version": VERSION, "ucloud": "example", "platform": "example", "token": "0" * 32, "ca_pem": "",
    "server_name": "example", "endpoints": ["0.0.0.0:0"],
}  # fmt: skip


def parse(untrusted: bytes) -> BootData:
    """Check the user data; Invalid with the field that is wrong."""
    if len(untrusted) > MAX_BYTES:
        raise Invalid(f"boot data of {len(untrusted)} bytes")
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise Invalid("boot data that is not JSON") from error
    return decode(BootData, value, "boot data", ignore_unknown=True)


def hostname(untrusted_meta: bytes, default: str) -> str:
    """The host name of the meta data, if it is one."""
    with contextlib.suppress(ValueError, RecursionError):
        value: Any = json.loads(untrusted_meta[:MAX_BYTES])
        name = value.get("hostname") if isinstance(value, dict) else None
        if isinstance(name, str) and 0 < len(name) <= 63 and name.replace("-", "a").isalnum():
            return name
    return default


def disk(serial: str) -> str:
    """The device node of the virtio disk with that serial; NotFound."""
    for name in sorted(os.listdir("/sys/block")):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/serial") as file:
            if file.read().strip() == serial:
                return f"/dev/{name}"
    raise NotFound(f"no disk has the serial {serial}")


def load() -> tuple[BootData, str]:
    """Boot data and host name; the config disk is mounted for the time of reading only."""
    os.makedirs(paths.BOOT, mode=0o700, exist_ok=True)
    flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount(disk("config"), paths.BOOT, "iso9660", flags)
    try:
        boot = parse(_read(_USER_DATA))
        with contextlib.suppress(FileNotFoundError):
            return boot, hostname(_read(_META_DATA), boot.platform)
        return boot, boot.platform
    finally:
        syscalls.unmount(paths.BOOT)


def load_directly(device: str) -> tuple[BootData, str]:
    """The same without mounting, past the kernel's cache: for a clone, whose disk is another."""
    iso = Iso(device)
    try:
        boot = parse(iso.read(_USER_DATA))
        with contextlib.suppress(NotFound):
            return boot, hostname(iso.read(_META_DATA), boot.platform)
        return boot, boot.platform
    finally:
        iso.close()


def _read(name: str) -> bytes:
    with open(f"{paths.BOOT}/{name}", "rb") as file:
        return file.read(MAX_BYTES + 1)
