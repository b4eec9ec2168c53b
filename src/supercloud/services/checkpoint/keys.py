"""All that is derived from the user's one secret, and records sealed under it.

Derivation is HMAC-SHA-256 of a label and what the key is for. No key seals two texts under one
nonce: a record's nonce is random under a key of that record's name; a chunk's is its place in its
pack, under a key of that pack, whose name no other writer has (``new_nonce``).
"""

import hmac
import os
import struct
import time
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from supercloud.model.errors import Denied, Invalid

SECRET_BYTES: Final = 32
NAME_BYTES: Final = 16
TAG_BYTES: Final = 16
_NONCE_BYTES: Final = 12
MAGIC: Final = b"SCCKPT\x00\x01"


class Refused(Denied):
    """A checkpoint that must not be restored; ``details["reason"]`` is the reason as a word.

    ``missing``, ``truncated``, ``tampered``, ``replayed`` (another one than was asked for),
    ``foreign`` (of another EE or U-Cloud), ``newer`` (of a later version of this software).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(
            message,
            hint="restore an older checkpoint, or one from another copy of the store",
            details={"reason": reason},
        )
        self.reason = reason


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """A checkpoint's name in the store: ascending by ``sequence``; ``nonce`` makes it unique."""

    sequence: int
    ee_id: str
    nonce: str

    def key(self, kind: str) -> str:
        """Its object of a kind: ``manifests``, ``leases`` or ``condemned``."""
        return f"{kind}/{self.sequence:012x}-{self.ee_id}-{self.nonce}"

    @staticmethod
    def of(key: str) -> "Ref":
        """The inverse of ``key``; Invalid."""
        fields = key.partition("/")[2].split("-")
        if list(map(len, fields)) != [12, 32, 32]:
            raise Invalid(f"{key!r:.80} is not the key of a checkpoint")
        return Ref(int(fields[0], 16), fields[1], fields[2])


class Keys:
    """The keys of one U-Cloud's checkpoints, from its secret of ``SECRET_BYTES``."""

    def __init__(self, secret: bytes, ucloud: str) -> None:
        if len(secret) != SECRET_BYTES:
            raise Invalid(f"the secret of checkpoints has {SECRET_BYTES} bytes, not {len(secret)}")
        self.ucloud = ucloud
        self._root = hmac.digest(secret, b"supercloud checkpoints " + ucloud.encode(), "sha256")
        self._naming = self._derive(b"chunk names")

    def chunk_name(self, data: bytes | bytearray | memoryview) -> bytes:
        """The name of a chunk: who lacks the key cannot tell what it holds, nor make two alike."""
        return hmac.digest(self._naming, data, "sha256")[:NAME_BYTES]

    def ee_id(self, ee: str) -> str:
        """What the store sees in place of an EE's name: 32 hex digits."""
        return self._derive(b"ee " + ee.encode())[:16].hex()

    def new_nonce(self, ee_id: str, sequence: int) -> str:
        """What makes a checkpoint's name unique: 32 hex digits.

        Of more than the random generator, since clones of one machine may share that.
        """
        label = f"nonce {ee_id} {sequence} {time.time_ns()} ".encode()
        return self._derive(label + os.urandom(16))[:16].hex()

    def pack(self, pack: bytes) -> AESGCM:
        """The cipher of the pack of that name (``chunks.PACK_NAME_BYTES``)."""
        return AESGCM(self._derive(b"pack " + pack))

    def seal(self, key: str, data: bytes) -> bytes:
        """The record that is to be put at an object's key."""
        nonce, header = os.urandom(_NONCE_BYTES), _header(key)
        return header + nonce + self._record(key).encrypt(nonce, data, header)

    def open(self, key: str, untrusted: bytes) -> bytes:
        """What was sealed for that key; Refused with the reason."""
        header = _header(key)
        if len(untrusted) < len(header) + _NONCE_BYTES + TAG_BYTES:
            raise Refused("truncated", f"{key} is cut short at {len(untrusted)} bytes")
        if not untrusted.startswith(header):
            raise _misplaced(key, untrusted)
        nonce = untrusted[len(header) : len(header) + _NONCE_BYTES]
        try:
            return self._record(key).decrypt(nonce, untrusted[len(header) + 12 :], header)
        except InvalidTag:
            text = f"{key} was altered, cut short or made with another key"
            raise Refused("tampered", text) from None

    def _record(self, key: str) -> AESGCM:
        return AESGCM(self._derive(b"record " + key.encode()))

    def _derive(self, label: bytes) -> bytes:
        return hmac.digest(self._root, label, "sha256")


def _header(key: str) -> bytes:
    return MAGIC + struct.pack("<H", len(key)) + key.encode()


def _misplaced(key: str, untrusted: bytes) -> Refused:
    """Why a record is not the one of this key."""
    if untrusted[: len(MAGIC) - 1] == MAGIC[:-1] and untrusted[len(MAGIC) - 1] > MAGIC[-1]:
        return Refused("newer", f"{key} is of a later version of this software")
    (length,) = struct.unpack_from("<H", untrusted, len(MAGIC))
    found = untrusted[len(MAGIC) + 2 :][:length].decode("ascii", "replace")
    try:
        wanted, other = Ref.of(key), Ref.of(found)
    except (Invalid, ValueError):
        return Refused("tampered", f"{key} is no record of checkpoints")
    if other.ee_id != wanted.ee_id:
        return Refused("foreign", f"{key} is a checkpoint of another EE")
    return Refused("replayed", f"in place of {wanted.sequence} stands checkpoint {other.sequence}")
