"""The platform's scratch disk: encrypted with a key of this boot, mounted at ``DATA``.

A template has its file system made and mounted, over a key that the kernel has overwritten, on a
disk that no clone has. What is to be on the disk is in the file ``SCRATCH``, with holes where
nothing is, and in the kernel's cache. A clone has the kernel take a new key and writes it there.
"""

import asyncio
import contextlib
import os

from supercloud.model.errors import NotFound
from supercloud.upper.platform.agent import devicemapper, paths, syscalls
from supercloud.upper.platform.agent.bootdata import disk
from supercloud.upper.platform.agent.processes import load_modules, run
from supercloud.upper.platform.agent.state import extents
from supercloud.wire.places import deposit_at

MAPPING = "scratch"
SERIAL = "scratch"
MODULES = ("dm_crypt", "xts", "aesni_intel")  # the kernel would ask for the ciphers one by one
# The file system dies with its key: no journal, nothing to reserve, nothing to zero now.
_FORMAT = (
    "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-i", "16384",
    "-O", "^has_journal,^resize_inode,^metadata_csum,extents,flex_bg,uninit_bg",
    "-E", "lazy_itable_init=1,nodiscard",
)  # fmt: skip


class Scratch:
    """Made in the background at start; ``ready`` is awaited by whoever needs it."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether ``ready`` would return at once."""
        task = self._task
        return task is not None and task.done() and task.exception() is None

    async def ready(self) -> None:
        """Return when ``DATA`` can be used; raises what went wrong; the next call tries again."""
        if self._task is None or (self._task.done() and self._task.exception() is not None):
            self._task = asyncio.ensure_future(_set_up())
        await asyncio.shield(self._task)


async def _set_up() -> None:
    if os.path.exists(paths.SCRATCH):
        _become_own()
    elif not os.path.ismount(paths.DATA):
        try:
            device = disk(SERIAL)
        except NotFound:
            device = ""  # a platform without one (a small cloud) keeps all in memory
        if device:
            await _mount_encrypted(device)
        else:
            os.makedirs(paths.DATA, exist_ok=True)
            syscalls.mount("tmpfs", paths.DATA, "tmpfs", syscalls.MS_NOSUID, "mode=0700,size=50%")
    os.chmod(paths.DATA, 0o700)
    for path in (paths.LAYERS, paths.BLOBS):
        os.makedirs(path, mode=0o700, exist_ok=True)


async def _mount_encrypted(device: str) -> None:
    mapped = devicemapper.find(MAPPING)
    if not mapped:
        await load_modules(*MODULES)
        mapped = devicemapper.crypt(MAPPING, device, _own_bytes(device))
    await _format(mapped)
    _mount(mapped)


async def _format(path: str) -> None:
    await run(*_FORMAT, path, env={"PATH": os.environ["PATH"], "MKE2FS_SYNC": "0"})


def _mount(mapped: str) -> None:
    os.makedirs(paths.DATA, exist_ok=True)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOATIME
    # its unused tables need not be zeroed either, by a thread that would encrypt the zeros
    syscalls.mount(mapped, paths.DATA, "ext4", flags, "nodiscard,noinit_itable")


async def prepare() -> None:
    """In a template: all but the key, and what is on the disk. Nothing is left when it fails."""
    device = disk(SERIAL)
    await load_modules(*MODULES)
    size_bytes = _own_bytes(device)
    part = f"{paths.SCRATCH}.part"
    with open(part, "wb") as file:
        file.truncate(size_bytes)
    await _format(part)
    os.rename(part, paths.SCRATCH)  # before there is a key: with it there, nobody uses that
    try:
        mapped = devicemapper.crypt(MAPPING, device, size_bytes)
        _copy(paths.SCRATCH, mapped)
        _mount(mapped)
        syscalls.sync_file_system(paths.DATA)
        _copy_back(mapped)
        devicemapper.forget_key(MAPPING)
    except OSError:
        with contextlib.suppress(OSError):
            syscalls.unmount(paths.DATA)
            devicemapper.remove(MAPPING)
            os.unlink(paths.SCRATCH)
        raise


def _become_own() -> None:
    """In a clone; may be repeated until ``SCRATCH`` has gone, for nobody uses the disk before."""
    devicemapper.new_key(MAPPING)
    _copy(paths.SCRATCH, devicemapper.find(MAPPING))  # into the cache: on the disk in time
    os.unlink(paths.SCRATCH)


def _copy(image: str, mapped: str) -> None:
    """All that the image has."""
    with open(image, "rb") as source, open(mapped, "r+b", buffering=0) as target:
        for start, end in extents(source.fileno()):
            target.seek(start)
            target.write(os.pread(source.fileno(), end - start, start))


def _copy_back(mapped: str) -> None:
    """The same parts, as they are since it was mounted."""
    with open(mapped, "rb") as source, open(paths.SCRATCH, "r+b", buffering=0) as target:
        for start, end in list(extents(target.fileno())):
            target.seek(start)
            target.write(os.pread(source.fileno(), end - start, start))


def _own_bytes(device: str) -> int:
    """What the platform uses of it: the end is left to what the host lays down there."""
    size_bytes = devicemapper.size_bytes(device)
    return deposit_at(size_bytes) or size_bytes
