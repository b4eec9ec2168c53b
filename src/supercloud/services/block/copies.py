"""Copies of a volume into another one: backups by dirty bitmaps, and clones.

Both are jobs of the source's daemon, which sees the target as an NBD disk that the target's daemon
exports; so the target may have any format, and it is protected as every volume is. A clone of a
snapshot is made by ``qemu-img``, since the storage daemon opens no snapshot. It reads the device
over a connection of its own while the source goes on: what belongs to a snapshot is written no more
for as long as that is there, and it is deleted by nobody while it is copied.
"""

import logging
from collections.abc import Callable
from typing import Any

from supercloud.model.errors import Invalid, SupercloudError
from supercloud.services.block import names
from supercloud.services.block.daemon import Programs, in_our_words
from supercloud.services.block.volume import Volume
from supercloud.wire.children import Children, how_it_ended

log = logging.getLogger("supercloud.services.block")

Done = Callable[[str], None]
"""Called once at a copy's end, with what went wrong or nothing."""


class Copy:
    """One copy under way. Both volumes say ``copying`` until it has ended."""

    def __init__(self, source: Volume, target: Volume, words: str, done: Done) -> None:
        if source.size_bytes != target.size_bytes:
            raise Invalid(
                f"volume {source.name} has {source.size_bytes} bytes, {target.name} has "
                f"{target.size_bytes}",
                hint="make both of one size",
            )
        self.source, self.target, self._done = source, target, done
        self.undo: Callable[[], None] = lambda: None  # of a copy that failed
        self.trouble = ""  # what is known to have happened, better than what it leads to
        self._finished = False
        self._address = target.daemon.serve_nbd(names.LIMITED, target.name, writable=True)
        source.copying = target.copying = words
        target.receiving = True

    @property
    def address(self) -> str:
        """Where the target is exported."""
        return self._address

    def abandon(self) -> None:
        """It did not even start."""
        self.source.copying = self.target.copying = ""
        self.target.receiving = False
        try:
            self.target.daemon.end_nbd()
        except SupercloudError as trouble:  # it is gone, which is told by itself
            log.info("after a copy: %s", trouble)

    def finish(self, error: str) -> None:
        """Put everything back as it was, and tell; once."""
        if self._finished:
            return
        self._finished = True
        self.abandon()
        try:
            if error:
                self.undo()
        except SupercloudError as trouble:
            log.info("after a copy: %s", trouble)
        self._done(error and (self.trouble or error))


def backup(copy: Copy, bitmap: str) -> dict[str, Any]:
    """Copy what has changed since the bitmap's last backup, or all: ``{full, reason, bytes}``.

    A bitmap is on the device with the volume. One that a crash has left behind is of no use.
    """
    source = copy.source
    found = next((b for b in source.bitmaps() if b["name"] == bitmap), None)
    reason = _why_full(found)
    if found is not None and reason:
        source.remove_bitmap(bitmap)
    try:
        _add_target(copy)
        if reason:
            _start_full(copy, bitmap)
        else:
            how = {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "on-success"}
            source.daemon.ask("blockdev-backup", _job() | how)
    except SupercloudError:
        _drop_target(copy)
        raise
    size = source.size_bytes if reason or found is None else int(found["count"])
    return {"full": bool(reason), "reason": reason, "bytes": size}


def _why_full(found: dict[str, Any] | None) -> str:
    if found is None:
        return "it is the first by this bitmap"
    if found.get("inconsistent"):
        return "what changed since the last one is not known: the storage daemon was killed"
    return ""


def _start_full(copy: Copy, bitmap: str) -> None:
    """All, and from that very moment on the bitmap."""
    source = copy.source
    add = {"node": names.VOLUME, "name": bitmap, "persistent": source.format == "qcow2"}
    actions = [
        {"type": "block-dirty-bitmap-add", "data": add},
        {"type": "blockdev-backup", "data": _job() | {"sync": "full"}},
    ]
    source.daemon.ask("transaction", {"actions": actions})
    copy.undo = lambda: source.remove_bitmap(bitmap)


def clone(copy: Copy) -> None:
    """Copy what the volume holds at this moment; it may be in use."""
    try:
        _add_target(copy)
        copy.source.daemon.ask("blockdev-backup", _job() | {"sync": "full"})
    except SupercloudError:
        _drop_target(copy)
        raise


def _job() -> dict[str, Any]:
    return {
        "job-id": names.COPY,
        "device": names.VOLUME,
        "target": names.TARGET,
        "auto-dismiss": False,
    }


def _add_target(copy: Copy) -> None:
    copy.source.daemon.ask("blockdev-add", names.target(copy.address, copy.target.name))


def _drop_target(copy: Copy) -> None:
    try:
        copy.source.daemon.ask("blockdev-del", {"node-name": names.TARGET})
    except SupercloudError as trouble:
        log.info("the target was not there: %s", trouble)


def concluded(copy: Copy) -> None:
    """The job has ended: learn how, and finish."""
    try:
        said = copy.source.daemon.end_job(names.COPY)
        _drop_target(copy)
    except SupercloudError as error:
        said = str(error)
    which = f"the copy of volume {copy.source.name} to {copy.target.name}"
    copy.finish(f"{which} failed: {in_our_words(said)}" if said else "")


def clone_snapshot(
    copy: Copy,
    snapshot: str,
    options: str,
    device: int,
    programs: Programs,
    children: Children,
) -> None:
    """Copy a snapshot; ``options`` are of the source's image over the connection ``device``."""
    to = names.raw_options(copy.address, copy.target.name)
    argv = [
        *(*programs.image, "convert", "-n", "-l", f"snapshot.name={snapshot}"),
        *("--image-opts", "--target-image-opts", options, to),
    ]

    def ended(status: int) -> None:
        copy.finish("" if status == 0 else f"qemu-img: {how_it_ended(status)}")

    children.start(argv, [device], ended)
