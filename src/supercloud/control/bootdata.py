"""A platform's boot data: the one-time token, and the config disk in the config-2 layout."""

import hashlib
import hmac
import io
import json
import os
from pathlib import Path
from typing import Final

from supercloud.control.documents import PlatformDocument
from supercloud.trust.names import control_of
from supercloud.wire.messages import PROTOCOL

VERSION: Final = PROTOCOL
TOKEN_LIFETIME_S: Final = 3600.0
MAX_CONFIG_BYTES: Final = 1 << 20
_USER_DATA, _META_DATA = "user_data", "meta_data.json"
_SECRET_BYTES = 32


class Tokens:
    """Makes tokens: a keyed hash of the platform and its incarnation.

    So a control plane that was killed between keeping the hash of a token and creating the
    platform hands out the same token again, and the platform that may be there already can enrol.
    The key never leaves the state directory.
    """

    def __init__(self, secret: bytes) -> None:
        """``secret`` is the key."""
        self._secret = secret

    @classmethod
    def ensure(cls, path: Path) -> "Tokens":
        """With the key in ``path`` (mode 0600), made when there is none yet."""
        if not path.exists():
            part = path.with_suffix(".part")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
                file.write(os.urandom(_SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        return cls(path.read_bytes())

    def token(self, platform: PlatformDocument, ucloud_uid: str) -> str:
        """The token of this incarnation of the platform: 64 hexadecimal digits."""
        about = f"{ucloud_uid}/{platform.ucloud}/{platform.name}/{platform.incarnation}"
        return hmac.new(self._secret, about.encode(), hashlib.sha256).hexdigest()


def user_data(ucloud: str, platform: str, token: str, ca_pem: str, endpoints: list[str]) -> bytes:
    """The agent's boot data, as docs/architecture has it."""
    return json.dumps(
        {
            "version": VERSION,
            "ucloud": ucloud,
            "platform": platform,
            "token": token,
            "ca_pem": ca_pem,
            "server_name": control_of(ucloud).dns,
            "endpoints": endpoints,
            "uplink": "dhcp",
        }
    ).encode()


def config_iso(ucloud: str, platform: str, user: bytes) -> bytes:
    """An ISO 9660 image, label ``config-2``, with Rock Ridge and Joliet names.

    Blocking (it builds the image in memory); ``pycdlib`` is loaded only here.
    """
    import pycdlib  # noqa: PLC0415 - large, needed seldom

    uuid = hashlib.sha256(f"{ucloud}/{platform}".encode()).hexdigest()[:32]
    meta = json.dumps({"uuid": uuid, "hostname": platform}).encode()
    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    iso.new(interchange_level=3, vol_ident="config-2", rock_ridge="1.09", joliet=3)
    for path, name in (("/OPENSTAC", "openstack"), ("/OPENSTAC/LATEST", "latest")):
        joliet = "/openstack" if name == "openstack" else "/openstack/latest"
        iso.add_directory(path, rr_name=name, joliet_path=joliet)
    for short, name, content in (("USERDATA", _USER_DATA, user), ("METADATA", _META_DATA, meta)):
        iso.add_fp(
            io.BytesIO(content),
            len(content),
            f"/OPENSTAC/LATEST/{short}.;1",
            rr_name=name,
            joliet_path=f"/openstack/latest/{name}",
        )
    iso.write_fp(out)
    iso.close()
    return out.getvalue()
