"""The data keys of a U-Cloud, wrapped under a key-encryption key; control plane only.

::

    DIRECTORY/UCLOUD/volumes.keys   key-encryption keys, one a line, the present one first (0600)

They are of its volumes and its object store. A data key is 256 bits, made here, and kept only
wrapped (AES Key Wrap, RFC 3394), as ``ID:BASE64``: ``ID`` names the key-encryption key. So are the
keys of those who use the object store. Rotation makes a new one, under which everything is wrapped
anew; the old one is kept until nothing is left under it, so that whoever dies in between can go on.
No data is touched by that.
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from typing import Final

from supercloud.model.errors import Denied, NotFound, Permanent
from supercloud.trust import builder, keywrap
from supercloud.trust.keywrap import KEY_BYTES, new_key
from supercloud.trust.names import check_label

FILE: Final = "volumes.keys"


class VolumeKeys:
    """The wrapping keys of one U-Cloud."""

    def __init__(self, path: str, keys: list[bytes]) -> None:
        self._path, self._keys = path, keys

    @classmethod
    def ensure(cls, directory: str, ucloud: str) -> "VolumeKeys":
        """Those of the trust directory; the first is made when there is none yet.

        Denied when others may read the file, Permanent when it is damaged.
        """
        home = os.path.join(directory, check_label(ucloud, "ucloud"))
        os.makedirs(home, mode=0o700, exist_ok=True)
        path = os.path.join(home, FILE)
        if not os.path.exists(path):
            _write(path, [new_key()])
        return cls(path, _read(path))

    @property
    def current(self) -> str:
        """The name of the key that new data keys are wrapped under."""
        return _name(self._keys[0])

    def make(self) -> str:
        """A new data key, wrapped."""
        return self._wrap(new_key())

    def wrap(self, secret: bytes) -> str:
        """A secret of somebody else, wrapped as it is; Invalid unless 16, 24, 32, ... bytes."""
        return self._wrap(secret)

    def unwrap(self, wrapped: str) -> bytes:
        """The data key. NotFound without its wrapping key, Denied when it was tampered with."""
        name, _, text = wrapped.partition(":")
        key = next((key for key in self._keys if _name(key) == name), None)
        if key is None:
            raise NotFound(
                f"the wrapping key {name:.16} of a volume is not in {self._path}",
                hint="put back the trust directory that the state belongs to",
            )
        try:
            return keywrap.unwrap(key, base64.b64decode(text, validate=True))
        except (Denied, binascii.Error) as error:
            raise Denied("a wrapped volume key was tampered with") from error

    def rewrapped(self, wrapped: str) -> str:
        """The same data key under the present wrapping key; unchanged if it is that already."""
        if wrapped.partition(":")[0] == self.current:
            return wrapped
        return self._wrap(self.unwrap(wrapped))

    def rotate(self) -> str:
        """Have a new wrapping key, beside the old ones; its name."""
        keys = [new_key(), *self._keys]
        _write(self._path, keys)
        self._keys = keys
        return self.current

    def settle(self, wrapped: Iterable[str]) -> int:
        """Forget the old wrapping keys that none of ``wrapped`` is under; how many."""
        needed = {text.partition(":")[0] for text in wrapped} | {self.current}
        keys = [key for key in self._keys if _name(key) in needed]
        forgotten = len(self._keys) - len(keys)
        if forgotten:
            _write(self._path, keys)
            self._keys = keys
        return forgotten

    def _wrap(self, data_key: bytes) -> str:
        wrapped = keywrap.wrap(self._keys[0], data_key)
        return f"{self.current}:{base64.b64encode(wrapped).decode()}"


def _name(key: bytes) -> str:
    return hashlib.sha256(b"supercloud volume wrapping key" + key).hexdigest()[:16]


def _write(path: str, keys: list[bytes]) -> None:
    builder.write_file(path, b"".join(key.hex().encode() + b"\n" for key in keys), 0o600)


def _read(path: str) -> list[bytes]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise Denied(f"others may read the key file {path}", hint=f"chmod 600 {path}")
        lines = file.read().split()
    try:
        keys = [bytes.fromhex(line.decode("ascii")) for line in lines]
    except ValueError as error:
        raise Permanent(f"{path} is damaged") from error
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise Permanent(f"{path} is damaged")
    return keys
