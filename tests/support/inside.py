"""Looking inside a platform of a real host: a root shell on its console, beside its agent.

The shell comes with a second cpio archive behind the image's own initrd, in a copy of the images.
"""

import asyncio
import hashlib
import json
import os
import secrets
from importlib import resources
from pathlib import Path

from supercloud.model.images import L1_FILES, l1_digest
from supercloud.wire.peer import Stream
from support.guest import cpio
from support.lower import ControlPlane

_LAST = "exec switch_root /newroot /usr/sbin/l1init"
_SHELL = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin HOME=/root PS1=
setsid sh -c "stty -echo -onlcr; cat | sh" < /dev/ttyS0 > /dev/ttyS0 2>&1 &
exec /usr/sbin/l1init
"""


def with_shell(images: Path, out: Path) -> Path:
    """The images with a shell on the platform's console."""
    for path in images.iterdir():
        if path.name not in ("initrd", "manifest.json"):
            os.link(path, out / path.name)
    boot = resources.files("supercloud.upper.platform.image").joinpath("files/boot-init")
    text = boot.read_text()
    assert _LAST in text
    text = text.replace(_LAST, "cp -a /guest /newroot/guest\n" + _LAST.replace("/usr/sbin/l1init", "/guest/run"))  # fmt: skip
    entries = {
        "guest": (0o040755, b""),
        "guest/run": (0o100755, _SHELL.encode()),
        "init": (0o100755, text.encode()),
    }
    initrd = (images / "initrd").read_bytes() + cpio(entries)
    (out / "initrd").write_bytes(initrd)
    manifest = json.loads((images / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(initrd).hexdigest(), "size_bytes": len(initrd)}
    manifest["files"]["initrd"] = entry
    named = {name: manifest["files"][name]["sha256"] for name in L1_FILES}
    manifest["l1_digest"] = l1_digest(named)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


async def inside(plane: ControlPlane, platform: str, command: str, timeout_s: float = 60) -> str:
    """What a command prints in the platform, run as its root."""
    mark, said = secrets.token_hex(8), b""
    # the mark is put together by the shell: an echo of the line is not taken for the answer
    line = f"({command}) 2>&1; echo; echo E''ND-{mark}\n".encode()
    end = f"END-{mark}".encode()
    async with plane.connected() as connection:
        stream = connection.peer.open("platform.console", {"name": platform})
        async with asyncio.timeout(timeout_s), stream as console:
            await console.write(f"echo BE''GIN-{mark}\n".encode() + line)
            nudging = asyncio.ensure_future(_nudge(console))
            try:
                async for data in console.chunks():
                    said += data
                    if end in said:
                        break
            finally:
                nudging.cancel()
    text = said.decode(errors="replace").replace("\r", "")
    return text.partition(f"BEGIN-{mark}")[2].partition(f"END-{mark}")[0].strip("\n")


async def _nudge(console: Stream) -> None:
    """The emulated port sometimes keeps what came last to itself."""
    while True:
        await asyncio.sleep(0.2)
        await console.write(b"\n")
