"""What a pretended platform reads from its config disk, with the limits of a real one."""

import io
import json
from dataclasses import dataclass

from supercloud.model.errors import Invalid
from supercloud.wire.codec import decode

_PATH = "/openstack/latest/user_data"
_MAX_USER_DATA_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BootData:
    """``user_data`` of docs/architecture, as far as an agent needs it to dial."""

    version: int
    ucloud: str
    platform: str
    token: str
    ca_pem: str
    server_name: str


def read(untrusted_iso: bytes) -> BootData:
    """The boot data on a config disk; Invalid when it has none."""
    import pycdlib  # noqa: PLC0415 - slow to load
    from pycdlib.pycdlibexception import PyCdlibException  # noqa: PLC0415

    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    try:
        iso.open_fp(io.BytesIO(untrusted_iso))
        paths = {"joliet_path": _PATH} if iso.has_joliet() else {"rr_path": _PATH}
        iso.get_file_from_iso_fp(out, **paths)
        untrusted = json.loads(out.getvalue()[:_MAX_USER_DATA_BYTES])
    except (PyCdlibException, ValueError, IndexError, KeyError) as error:
        raise Invalid(f"no boot data on the config disk: {error!s:.200}") from error
    return decode(BootData, untrusted, "user_data", ignore_unknown=True)
