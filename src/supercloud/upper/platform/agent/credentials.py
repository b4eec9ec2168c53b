"""How a VM is told what is secret: as systemd's credentials, in its firmware's tables.

They are OEM strings (SMBIOS, DSP0134, structure type 11) as systemd.system-credentials(7) has them,
each ``io.systemd.credential.binary:NAME=BASE64``. A Linux guest finds them, root alone, in
``/sys/firmware/dmi/entries/11-0/raw``, with a zero byte after each. systemd from version 252 on
takes them by itself, and does what ``tmpfiles.extra`` says: any such image has both files in
``/etc`` before its services start.

QEMU reads them out of sealed memory files whose descriptors it inherits: nothing of them is in an
argument, an environment or a file. They are copied into the guest's RAM when its firmware starts.
"""

import base64
import fcntl
import os
import re
from collections.abc import Callable
from typing import Final

from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent.oci import CA_FILE, store_variables
from supercloud.wire.messages import EnvironmentSpec

OBJECTS: Final = "supercloud.objects"
"""Lines ``NAME=value``, for an ``EnvironmentFile`` of systemd's or a shell."""

CA: Final = "supercloud.ca"
"""The root certificate that vouches for the object store."""

FILES: Final = {OBJECTS: ("/etc/supercloud-objects.env", 0o600), CA: (f"/etc/{CA_FILE}", 0o644)}
"""Where a guest is to have them."""

_SYSTEMD_FILES: Final = "tmpfiles.extra"
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.:/+=@,-]*")
"""What means itself to a shell and to systemd."""
_SEALS: Final = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
)  # fmt: skip


def of(spec: EnvironmentSpec) -> dict[str, bytes]:
    """By name. Invalid: a value that would be more than one."""
    if spec.objects is None:
        return {}
    lines = []
    for name, value in store_variables(spec).items():
        if not _PLAIN.fullmatch(value):
            raise Invalid(f"the {name} of {spec.name} cannot be a line of a file")
        lines.append(f"{name}={value}\n")
    found = {OBJECTS: "".join(lines).encode(), CA: spec.objects.ca_pem.encode()}
    return {**found, _SYSTEMD_FILES: _tmpfiles(found)}


def _tmpfiles(found: dict[str, bytes]) -> bytes:
    """For tmpfiles.d(5): written anew at each start, whatever was there."""
    lines = [
        f"f+~ {path} {mode:04o} root root - {_base64(found[name])}\n"
        for name, (path, mode) in FILES.items()
    ]
    return "".join(lines).encode()


def arguments(spec: EnvironmentSpec, give: Callable[[int], int]) -> list[str]:
    """QEMU's; ``give`` takes over a descriptor that it is to inherit, and returns its number."""
    strings = [
        f"io.systemd.credential.binary:{name}={_base64(value)}" for name, value in of(spec).items()
    ]
    paths = [f"path=/proc/self/fd/{give(_memory_file(text))}" for text in strings]
    return ["-smbios", ",".join(["type=11", *paths])] if paths else []


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _memory_file(text: str) -> int:
    file = os.memfd_create("credential", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(file, text.encode())
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    return file
