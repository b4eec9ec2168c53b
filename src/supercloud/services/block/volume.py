"""One open volume: its image on the device, its snapshots, its limits, who has it attached."""

import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from supercloud.model.errors import (
    BadState,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    Permanent,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.services.block import capacity, names
from supercloud.services.block.daemon import Daemon, Programs, connect

MAX_SNAPSHOTS: Final = 128
TOOL_TIMEOUT_S: Final = 60.0

log = logging.getLogger("supercloud.services.block")


@dataclass(frozen=True, slots=True)
class Attachment:
    """To whom a volume is exported, and how."""

    machine: str
    mode: str  # vhost-user-blk | nbd
    read_only: bool


class Volume:
    """A volume whose daemon runs. Whoever calls has checked that it may be done now."""

    def __init__(
        self,
        name: str,
        image_format: str,
        daemon: Daemon,
        programs: Programs,
        device_bytes: int = 0,
    ) -> None:
        self.name, self.format = name, image_format
        self.daemon, self._programs = daemon, programs
        self.attachment: Attachment | None = None
        self.limits: dict[str, int] = {}
        self.copying = ""  # what is being copied, in words; nothing when nothing is
        self.receiving = False  # the copy is into this one
        self.size_bytes = self._end_bytes = 0
        announced = int(self.daemon.nodes()[names.WIRE]["image"]["virtual-size"])
        self.device_bytes = device_bytes or announced
        self.daemon.ask("blockdev-add", names.device(self.device_bytes))

    # -- making and opening

    def create(self, size_bytes: int) -> bool:
        """Make the image, then open it; False when it was made before. Exists: another is there."""
        needed = capacity.image_bytes(size_bytes, self.format)
        capacity.require(self.device_bytes, needed, f"a volume of {size_bytes} bytes")
        if self.format == "raw" or not self._is_image():
            self._make(size_bytes)
            self.open()
            return True
        self.open()
        if self.size_bytes != size_bytes:
            message = f"the device holds a volume of {self.size_bytes} bytes already"
            raise Exists(message, hint="open it, and grow it")
        return False

    def _make(self, size_bytes: int) -> None:
        if self.format == "raw":
            if size_bytes != self.device_bytes:
                message = f"a raw volume is as large as its device: {self.device_bytes} bytes"
                raise Invalid(message, where="size_bytes")
            return
        image = {"driver": "qcow2", "file": names.DEVICE, "size": size_bytes}
        self.daemon.run_job(
            "blockdev-create", {"options": image | {"cluster-size": names.CLUSTER_BYTES}}
        )

    def _is_image(self) -> bool:
        """Whether the device holds a qcow2 image; tried out, since it can't be asked."""
        try:
            self.daemon.ask("blockdev-add", names.volume("qcow2") | {"read-only": True})
        except SupercloudError as error:
            if "not in qcow2 format" in str(error):
                return False
            raise
        self.daemon.ask("blockdev-del", {"node-name": names.VOLUME})
        return True

    def open(self) -> None:
        """Check the image (what a crash has leaked is freed) and take it into use."""
        if self.format == "qcow2":
            self._check()
        self._take_into_use()

    def _check(self) -> None:
        with self._bare_device() as address:
            found = self._checked(address)
            if found.get("leaks"):  # only in an image that is whole: a repair of others harms
                found = self._checked(address, "-r", "leaks")
        self._end_bytes = int(found.get("image-end-offset", 0))

    def _checked(self, address: str, *repair: str) -> dict[str, Any]:
        options = names.image_options(address, "qcow2")
        words = ("check", *repair, "--output", "json", "--image-opts", options)
        try:
            found: dict[str, Any] = json.loads(self._tool(*words, fails=True))
        except ValueError as error:
            message = "there is no volume on the device, or its image is damaged beyond reading"
            raise Permanent(message) from error
        if found.get("corruptions") or found.get("check-errors"):
            raise Permanent(
                f"the volume's image is damaged: {found.get('corruptions', 0)} corruptions, "
                f"{found.get('check-errors', 0)} errors; it is left as it is"
            )
        return found

    def _take_into_use(self) -> None:
        self.daemon.ask("blockdev-add", names.volume(self.format))
        self.daemon.ask("blockdev-add", names.limited())
        self._measure()

    def _put_aside(self) -> None:
        for node in (names.LIMITED, names.VOLUME):
            self.daemon.ask("blockdev-del", {"node-name": node})

    def _measure(self) -> None:
        node = self.daemon.nodes()[names.VOLUME]
        self.size_bytes = int(node["image"]["virtual-size"])

    @contextmanager
    def _bare_device(self) -> Iterator[str]:
        """The device itself exported to our own tools, while the image is not in use."""
        address = self.daemon.serve_nbd(names.DEVICE, names.DEVICE, writable=True)
        try:
            yield address
        finally:
            self.daemon.end_nbd()

    @contextmanager
    def put_aside(self) -> Iterator[str]:
        """The image out of use, its device exported to our own tools; then in use again."""
        self._put_aside()
        try:
            with self._bare_device() as address:
                yield address
        finally:
            self._take_into_use()

    def _tool(self, *words: str, fails: bool = False) -> str:
        """Run qemu-img on our own export."""
        try:
            done = subprocess.run(
                [*self._programs.image, *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TOOL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Temporary(f"{words[0]} took longer than {TOOL_TIMEOUT_S:g} s") from error
        if done.returncode and not fails:
            raise Permanent(f"{words[0]} failed: {done.stderr.strip()[-500:]}")
        return done.stdout

    # -- what it holds

    @property
    def end_bytes(self) -> int:
        """Where the image ends on the device, at most: what snapshots may keep."""
        stats = self.daemon.ask("query-blockstats", {"query-nodes": True})
        written = (s["stats"]["wr_highest_offset"] for s in stats if s["node-name"] == names.DEVICE)
        return max(self._end_bytes, *map(int, written))

    def snapshots(self) -> list[dict[str, Any]]:
        """``[{snapshot, taken_s}]``, oldest first."""
        image = self.daemon.nodes()[names.VOLUME]["image"]
        return [
            {"snapshot": s["name"], "taken_s": s["date-sec"] + s["date-nsec"] / 1e9}
            for s in image.get("snapshots", [])
        ]

    def _has_snapshot(self, snapshot: str) -> bool:
        return any(s["snapshot"] == snapshot for s in self.snapshots())

    def need_snapshot(self, snapshot: str) -> None:
        """NotFound when there is none of that name."""
        if not self._has_snapshot(snapshot):
            raise NotFound(f"volume {self.name} has no snapshot {snapshot}", where="snapshot")

    def snapshot(self, snapshot: str) -> None:
        """Keep what the volume holds now; it may be in use. Exists when the name is taken."""
        self._need_qcow2("snapshots")
        if self._has_snapshot(snapshot):
            raise Exists(f"volume {self.name} has a snapshot {snapshot} already")
        if len(self.snapshots()) >= MAX_SNAPSHOTS:
            message = (
                f"volume {self.name} has {MAX_SNAPSHOTS} snapshots, the most that there may be"
            )
            raise NoResources(message, hint="delete some")
        used = self.end_bytes
        needed = capacity.image_bytes(self.size_bytes, used_bytes=used)
        what = f"another snapshot of volume {self.name}"
        capacity.require(self.device_bytes, needed, what, used_bytes=used)
        arguments = {"device": names.LIMITED, "name": snapshot}
        self.daemon.ask("blockdev-snapshot-internal-sync", arguments)

    def delete_snapshot(self, snapshot: str) -> None:
        """Drop a snapshot; done already is done."""
        if self._has_snapshot(snapshot):
            arguments = {"device": names.LIMITED, "name": snapshot}
            self.daemon.ask("blockdev-snapshot-delete-internal-sync", arguments)

    def revert(self, snapshot: str, size_bytes: int = 0) -> list[str]:
        """Go back to a snapshot. The bitmaps that are so lost: what follows them is a full backup.

        It stays as large as it is, though it may have been smaller when the snapshot was taken:
        there was room for that when it grew, and what is given up by going back is free again. Or
        it becomes ``size_bytes``, which it had before a try that was cut short.
        A bitmap knows nothing of what changes by going back, so an increment by it would be wrong.
        """
        self.need_snapshot(snapshot)
        lost = [bitmap["name"] for bitmap in self.bitmaps()]
        size_bytes = max(size_bytes, self.size_bytes)
        for bitmap in lost:
            self.remove_bitmap(bitmap)
        with self.put_aside() as address:
            options = names.image_options(address, "qcow2")
            self._tool("snapshot", "-q", "-a", snapshot, "--image-opts", options)
        if self.size_bytes < size_bytes:
            self._resize(size_bytes)
        return lost

    def grow(self, size_bytes: int, device_bytes: int = 0) -> None:
        """Make it larger, on a device that has grown. BadState over NBD: its clients can't be told.

        QEMU takes no other size of a raw node that has one; so a raw volume is opened again.
        """
        if size_bytes < self.size_bytes:
            raise Invalid(f"volume {self.name} has {self.size_bytes} bytes and can only grow")
        if size_bytes == self.size_bytes:
            return
        if self.format == "raw":
            hint = "grow the device and open the volume again"
            raise Unsupported("a raw volume is as large as its device", hint=hint)
        if self.attachment is not None and self.attachment.mode == "nbd":
            raise BadState(f"volume {self.name} is attached by NBD", hint="detach it, then grow it")
        self._see(device_bytes)
        used = self.end_bytes if self.snapshots() else 0
        needed = capacity.image_bytes(size_bytes, used_bytes=used)
        capacity.require(self.device_bytes, needed, f"volume {self.name} of {size_bytes} bytes")
        self._resize(size_bytes)

    def _resize(self, size_bytes: int) -> None:
        self.daemon.ask("block_resize", {"node-name": names.LIMITED, "size": size_bytes})
        self._measure()

    def _see(self, device_bytes: int) -> None:
        """Use all of the device, which has grown."""
        if device_bytes > self.device_bytes:
            self.daemon.ask("blockdev-reopen", {"options": [names.device(device_bytes)]})
            self.device_bytes = device_bytes

    def _need_qcow2(self, what: str) -> None:
        if self.format != "qcow2":
            raise Unsupported(f"a {self.format} volume has no {what}", hint="use format qcow2")

    # -- dirty bitmaps

    def bitmaps(self) -> list[dict[str, Any]]:
        """What QEMU says of each: ``name``, ``count`` (dirty bytes), ``inconsistent``."""
        found: list[dict[str, Any]] = self.daemon.nodes()[names.VOLUME].get("dirty-bitmaps", [])
        return [bitmap for bitmap in found if "name" in bitmap]

    def remove_bitmap(self, bitmap: str) -> None:
        """Forget what has changed."""
        arguments = {"node": names.VOLUME, "name": bitmap}
        self.daemon.ask("block-dirty-bitmap-remove", arguments)

    # -- use

    def attach(self, wish: Attachment) -> Any:
        """Export it: a connected socket for the machine's QEMU. One machine at a time has it."""
        writable = not wish.read_only
        serve: Callable[[], str] = (
            (lambda: self.daemon.serve_nbd(names.LIMITED, self.name, writable=writable))
            if wish.mode == "nbd"
            else (lambda: self.daemon.serve_vhost(names.LIMITED, writable=writable))
        )
        self.detach()  # the same machine again, which has lost the other end
        address = serve()
        self.attachment = wish
        try:
            return connect(address)
        except SupercloudError:
            self.detach()
            raise

    def detach(self) -> None:
        """Export it no more."""
        if self.attachment is None:
            return
        if self.attachment.mode == "nbd":
            self.daemon.end_nbd()
        else:
            self.daemon.end_vhost()
        self.attachment = None

    def throttle(self, limits: dict[str, int]) -> None:
        """Live limits on what machines do: ``iops`` and ``bytes_per_s``, 0 is none."""
        wanted = {"iops-total": limits["iops"], "bps-total": limits["bytes_per_s"]}
        place = {"path": f"/objects/{names.GROUP}", "property": "limits"}
        self.daemon.ask("qom-set", place | {"value": wanted})
        # who waits by the old limits would go on doing so: a reopen lets them ask again
        self.daemon.ask("blockdev-reopen", {"options": [names.limited()]})
        self.limits = limits

    def close(self) -> None:
        """End its daemon in order."""
        self.daemon.quit()

    def status(self) -> dict[str, Any]:
        """For ``volume.stats``."""
        have = self.attachment
        return {
            "size_bytes": self.size_bytes,
            "device_bytes": self.device_bytes,
            "end_bytes": self.end_bytes if self.format == "qcow2" else self.size_bytes,
            "machine": have.machine if have else "",
            "mode": have.mode if have else "",
            "limits": self.limits,
            "copying": self.copying,
        }
