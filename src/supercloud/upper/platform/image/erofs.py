"""erofs images from tars, by the tool tree's mkfs.erofs; equal input gives equal output."""

import hashlib
import subprocess
import uuid
from collections.abc import Iterable
from pathlib import Path

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.upper.platform.image.tree import EPOCH_S, TAR_END

_NAMESPACE = uuid.UUID("6f4a1a3e-6f0c-5d2f-9f43-3f2d5b0f7c11")


def from_tars(out: Path, tars: Iterable[bytes], tools: ToolTree) -> None:
    """Write ``out`` from tars without ends, joined.

    Not compressed: it is read from memory or under emulation, where decompressing costs more
    than reading.
    """
    joined = b"".join((*tars, TAR_END))
    identity = uuid.uuid5(_NAMESPACE, hashlib.sha256(joined).hexdigest())
    command = [
        *tools.argv("mkfs.erofs"),
        "--quiet",
        "--tar=f",
        f"-T{EPOCH_S}",
        f"-U{identity}",
        "--all-root",
        str(out),
    ]
    done = subprocess.run(command, input=joined, capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-2000:]
        raise Permanent(f"mkfs.erofs failed with status {done.returncode}: {said}")
