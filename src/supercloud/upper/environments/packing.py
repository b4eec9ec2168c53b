"""Kernel and initrd of a VM in one compressed erofs file, which its platform can mount.

A kernel that boots without unpacking itself is large, and what is pulled by a platform is received,
decrypted, hashed and written there: less than half of it is worth the unpacking, which is LZ4's.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image.tools import ToolTree

_OPTIONS = ("--quiet", "-zlz4hc,9", "-C65536", "-T0", "--all-root",
            "-U7a1f2f8a-5d0e-5b1c-9a0f-3c7d5b1e6f42")  # fmt: skip
_TIMEOUT_S = 600


def pack(files: Mapping[str, Path], out: Path, tools: ToolTree) -> None:
    """Write an erofs of ``files`` (name in it -> file) to ``out``; equal files give equal bytes.

    Blocking. Raises Permanent when it cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".pack-") as staging:
        for name, path in files.items():
            shutil.copyfile(path, f"{staging}/{name}")
            os.chmod(f"{staging}/{name}", 0o644)  # the engine that opens it is not root
        done = subprocess.run(
            [*tools.argv("mkfs.erofs"), *_OPTIONS, str(out), staging],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()[-500:]
        raise Permanent(f"mkfs.erofs failed with status {done.returncode}: {text}")
