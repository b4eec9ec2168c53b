"""The memory of a machine, copied while it runs: QEMU's migration into a file, and back to work.

::

    copying   all of it, once; QEMU notes what is written meanwhile
    holding   some MiB are left, and it is made to wait: time for the agent's word
    ending    what is left, what was written, again, until little is; then it stops the machine
    still     the machine stands still: the disk and the devices are seen to
    whole     the last pages are in the file

What is written by others that map the machine's memory is noted as well: a daemon of vhost-user
keeps the log that the protocol has for migrations. The file has each page at its own place, behind
a header and a bitmap of those that are not zero (capability ``mapped-ram``; source:
docs/devel/migration/mapped-ram.rst of QEMU). The machine is left stopped.

QEMU cannot be told to wait before it ends, so it is slowed down to next to nothing; it looks at
that ten times a second. Should it come to the end all the same, it is taken back, and tried once
more, waiting from the beginning; ``held`` is called again then.
"""

import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from supercloud.model.errors import BadState, NoResources, SupercloudError, Temporary
from supercloud.model.states import Transitions, step
from supercloud.wire.qmp import Qmp, Refused
from supercloud.wire.reactor import Reactor

LEFT_BYTES: Final = 64 << 20
"""So much is left for when its agent has answered."""
LOOK_S: Final = 0.01
COPY_S: Final = 120.0
END_S: Final = 1.0
"""For an end with little left; then with whatever is left."""
ANSWER_S: Final = 10.0
AGAIN_S: Final = 0.0005
_FAST, _HELD, _SUPPOSED = 64 << 30, 64 << 10, 400 << 20  # bytes a second
_SHORT_MS, _LONG_MS = 10, 2000
_FILE_SET: Final = 22
_CAPABILITIES: Final = {
    "mapped-ram": True,
    "pause-before-switchover": True,
    "events": True,
    "x-ignore-shared": False,
}
_STATES: Final[Transitions] = {
    "new": frozenset({"copying"}),
    "copying": frozenset({"holding", "back"}),
    "holding": frozenset({"ending", "back"}),
    "ending": frozenset({"still", "back"}),
    "still": frozenset({"whole", "back"}),
    "back": frozenset({"copying", "over"}),
    "whole": frozenset({"over"}),
    "over": frozenset(),
}

# Of the header: the block's name, its size, version, page size, where bitmap and pages are.
_BLOCK: Final = struct.Struct(">4sQIQQQ")
_NAME, _VERSION = b"\x03ram", 1
_HEADER_BYTES: Final = 4096
_MAX_OFFSET: Final = 1 << 30
_PAGE_BYTES: Final = 4096
_PIECE_BYTES: Final = 16 << 20
_BITS: Final = [bytes(value >> bit & 1 for bit in range(8)) for value in range(256)]

log = logging.getLogger("supercloud.lower.vmm")


class Image(NamedTuple):
    """Where the memory is in the file, and how many bytes of it are not zero."""

    offset: int
    filled_bytes: int


class Precopy:
    """Of one machine, once. ``held`` and ``still`` are called when it is that; or ``failed``."""

    def __init__(
        self,
        reactor: Reactor,
        qmp: Qmp,
        held: Callable[[], None],
        still: Callable[[], None],
        failed: Callable[[SupercloudError], None],
    ) -> None:
        self._reactor, self._qmp = reactor, qmp
        self._held, self._still, self._failed = held, still, failed
        self._state, self._status = "new", ""
        self._file, self._most_bytes, self._left_bytes = -1, 0, LEFT_BYTES
        self._is_given = False

    def start(self, file: int, most_bytes: int) -> None:
        """Begin to copy into an empty memory file, which stays open; NoResources beyond most."""
        self._file, self._most_bytes = file, most_bytes
        again = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._qmp.ask("add-fd", {"fdset-id": _FILE_SET}, descriptors=[again])
        finally:
            os.close(again)
        self._is_given = True
        self._copy()

    @property
    def is_held(self) -> bool:
        """Whether its agent's word is waited for."""
        return self._state == "holding"

    def finish(self) -> None:
        """Its agent has given its word: come to the end."""
        self._go("ending")
        fast = {"max-bandwidth": _FAST, "avail-switchover-bandwidth": _SUPPOSED}
        self._qmp.ask("migrate-set-parameters", fast)
        self._reactor.after(END_S, self._insist)
        self._reactor.after(END_S + ANSWER_S, lambda: self._late("ending"))

    def complete(self) -> None:
        """The last pages, while it is still; then it is whole, and may go on."""
        self._qmp.ask("migrate-continue", {"state": "pre-switchover"})
        ends = ("completed", "failed", "cancelled")
        if not self._qmp.wait(lambda: self._status in ends, ANSWER_S):
            raise Temporary("the last pages were not copied in time")
        if self._status != "completed":
            raise Temporary("QEMU could not copy the last pages")
        self._go("whole")

    def close(self) -> None:
        """Take it back unless it is whole; the machine runs as before. Safe to repeat."""
        if self._state in ("copying", "holding", "ending", "still"):
            try:
                self._take_back()
            except SupercloudError as error:  # the watchdog's affair
                log.warning("a copy of memory is not taken back: %s", error)
        if self._state in ("back", "whole"):
            self._go("over")
        if self._is_given:
            self._is_given = False
            self._qmp.command("remove-fd", {"fdset-id": _FILE_SET})

    def on_qmp(self, name: str, data: dict[str, Any]) -> None:
        """An event of QEMU's."""
        if name != "MIGRATION" or self._state in ("new", "over"):
            return
        self._status = str(data.get("status"))
        if self._status == "pre-switchover":  # not from here: who reads this waits for answers
            self._reactor.after(0, self._switching)
        elif self._status == "failed" and self._state in ("copying", "holding", "ending"):
            self._reactor.after(0, lambda: self._give_up(Temporary("QEMU could not copy memory")))

    # -- its steps

    def _go(self, state: str) -> None:
        self._state = step(_STATES, self._state, state)

    def _copy(self) -> None:
        os.ftruncate(self._file, 0)
        self._status = ""
        wanted = [{"capability": name, "state": on} for name, on in _CAPABILITIES.items()]
        self._qmp.ask("migrate-set-capabilities", {"capabilities": wanted})
        is_again = self._left_bytes > LEFT_BYTES
        speed = {"max-bandwidth": _HELD if is_again else _FAST, "avail-switchover-bandwidth": 0}
        self._qmp.ask("migrate-set-parameters", {**speed, "downtime-limit": _SHORT_MS})
        self._go("copying")
        self._qmp.ask("migrate", {"uri": f"file:/dev/fdset/{_FILE_SET}"})
        self._reactor.after(COPY_S, lambda: self._late("copying"))
        self._look()

    def _look(self) -> None:
        if self._state in ("copying", "holding", "ending"):
            self._qmp.command("query-migrate", None, self._seen)

    def _seen(self, answer: dict[str, Any]) -> None:
        found = answer.get("return", {})
        left_bytes = found.get("ram", {}).get("remaining", 0)
        if os.fstat(self._file).st_blocks * 512 > self._most_bytes:
            error = NoResources(f"more than {self._most_bytes} bytes of memory are in use")
            self._reactor.after(0, lambda: self._give_up(error))
            return
        is_near = found.get("status") == "active" and left_bytes <= self._left_bytes
        if self._state == "copying" and is_near:
            self._hold()
        self._reactor.after(LOOK_S, self._look)

    def _hold(self) -> None:
        self._go("holding")
        self._qmp.command("migrate-set-parameters", {"max-bandwidth": _HELD})
        self._held()

    def _insist(self) -> None:
        if self._state == "ending":
            self._qmp.command("migrate-set-parameters", {"downtime-limit": _LONG_MS})

    def _switching(self) -> None:
        if self._state == "ending":
            self._go("still")
            self._still()
        elif self._left_bytes > LEFT_BYTES:
            self._give_up(Temporary("memory was copied sooner than its agent answered"))
        elif self._state in ("copying", "holding"):
            self._from_the_beginning()

    def _from_the_beginning(self) -> None:
        """It ended before anybody looked: hold it as soon as it begins."""
        try:
            self._take_back()
            self._left_bytes = 1 << 63
            self._copy()
        except SupercloudError as error:
            self._give_up(error)

    def _late(self, state: str) -> None:
        if self._state == state:
            self._give_up(Temporary("the machine's memory was not copied in time"))

    def _give_up(self, error: SupercloudError) -> None:
        if self._state in ("copying", "holding", "ending", "back"):
            self.close()
            self._failed(error)

    def _take_back(self) -> None:
        """No copy is being made any more, and the machine runs."""
        self._go("back")
        ends = ("completed", "failed", "cancelled")
        if self._status not in ends:
            self._qmp.ask("migrate_cancel")
            if not self._qmp.wait(lambda: self._status in ends, ANSWER_S):
                raise Temporary("QEMU goes on copying memory")
        go_on(self._qmp)


def go_on(qmp: Qmp) -> None:
    """Have the machine run; a migration that is over is not finished yet for some milliseconds."""
    deadline_s = time.monotonic() + ANSWER_S
    while True:
        try:
            qmp.ask("cont")
        except Refused:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(AGAIN_S)
        else:
            return


def settle(file: int, memory_bytes: int) -> Image:
    """Where the memory is in a file that is whole; its pages are all as they are to be.

    A page that became zero while it was copied is known to the bitmap only. BadState when the file
    is none that we understand.
    """
    head = os.pread(file, _HEADER_BYTES, 0)
    at = head.find(_NAME + struct.pack(">QI", memory_bytes, _VERSION))
    if at < 0 or at + _BLOCK.size > len(head):
        raise BadState("QEMU wrote memory in another way than is understood")
    _, _, _, page_bytes, bitmap, offset = _BLOCK.unpack_from(head, at)
    if page_bytes != _PAGE_BYTES or not 0 < bitmap < offset <= _MAX_OFFSET:
        raise BadState(f"QEMU wrote memory in pages of {page_bytes} bytes at {offset}")
    pages = b"".join(
        map(_BITS.__getitem__, os.pread(file, memory_bytes // _PAGE_BYTES // 8, bitmap))
    )
    if len(pages) != memory_bytes // _PAGE_BYTES:
        raise BadState("QEMU wrote memory without saying which pages")
    for start, end in extents(file, offset, offset + memory_bytes):
        first, last = (start - offset) // _PAGE_BYTES, -(-(end - offset) // _PAGE_BYTES)
        for gap in re.finditer(rb"\0+", pages[first:last]):
            _clear(file, start + gap.start() * _PAGE_BYTES, len(gap[0]) * _PAGE_BYTES)
    return Image(offset, pages.count(1) * _PAGE_BYTES)


def extents(file: int, at: int, limit: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has anything, between two offsets."""
    while at < limit:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            return
        end = min(os.lseek(file, at, os.SEEK_HOLE), limit)
        if at < end:
            yield at, end
        at = end


def _clear(file: int, offset: int, size: int) -> None:
    while size:
        done = os.pwrite(file, bytes(min(size, _PIECE_BYTES)), offset)
        offset, size = offset + done, size - done
