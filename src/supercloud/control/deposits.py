"""Blobs laid down on a platform's scratch disk by its host, when its agent asks for one so.

That disk is the provider's: what goes there is encrypted under a key of its own, which the agent
gets over its link. It checks the content's hash as it does for what comes over the link.
"""

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import PlatformDocument
from supercloud.model.errors import Invalid, Permanent
from supercloud.wire.messages import Blob, Deposited
from supercloud.wire.places import DEPOSIT_BYTES

CHUNK_BYTES: Final = 1 << 20
_KEY_BYTES, _BLOCK_BYTES = 32, 16


async def deposit(plane: Plane, platform: PlatformDocument, asked: Blob, path: Path) -> Deposited:
    """As much of the file from ``asked.offset_bytes`` on as there is room for."""
    if asked.offset_bytes > asked.size_bytes:
        raise Invalid(f"offset {asked.offset_bytes} is past the end of {asked.digest}")
    if (size := os.stat(path).st_size) != asked.size_bytes:
        raise Permanent(f"{asked.digest} has {size} bytes, asked for are {asked.size_bytes}")
    key, count = os.urandom(_KEY_BYTES), min(size - asked.offset_bytes, DEPOSIT_BYTES)
    provider = plane.pool.get(platform.ucloud, platform.wish.provider)
    await plane.seam(
        "provider.deposit",
        lambda: provider.deposit(
            platform.name, count, _enciphered(path, asked.offset_bytes, count, key)
        ),
    )
    return Deposited(size_bytes=count, key_base64=base64.b64encode(key).decode())


async def _enciphered(path: Path, offset: int, count: int, key: bytes) -> AsyncIterator[bytes]:
    cipher = Cipher(AES(key), CTR(bytes(_BLOCK_BYTES))).encryptor()
    with closing(path.open("rb")) as file:
        file.seek(offset)

        def piece() -> bytes:
            return cipher.update(file.read(min(CHUNK_BYTES, left)))

        left = count
        while left and (data := await asyncio.to_thread(piece)):
            left -= len(data)
            yield data
