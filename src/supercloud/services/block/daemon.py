"""One ``qemu-storage-daemon``, our child: its start, its monitor, what it exports, its end."""

import json
import logging
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from supercloud.model.errors import (
    BadState,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
    Unsupported,
    UserError,
)
from supercloud.services.block import names
from supercloud.wire.children import Children, how_it_ended
from supercloud.wire.qmp import Gone, Qmp, Refused
from supercloud.wire.reactor import Reactor

START_S: Final = 20.0
QUIT_S: Final = 20.0
_DELETED_S: Final = 10.0

# QEMU's words -> ours: the first that is found in them
_MEANINGS: Final[tuple[tuple[str, type[UserError]], ...]] = (
    (r"already exists|Duplicate|already in use", Exists),
    (r"not found|does not exist|doesn't exist|Can't find|Cannot find|No such", NotFound),
    (r"No space left|too large|not enough space", NoResources),
    (r"in use|busy|Permission conflict|is locked|active dirty bitmaps", BadState),
    (r"different sizes|Invalid|must be|format|Cannot shrink|corrupt", Invalid),
    (r"not support|Unsupported|not implemented", Unsupported),
)

log = logging.getLogger("supercloud.services.block")


@dataclass(frozen=True, slots=True)
class Programs:
    """How to call the programs of the runtime image."""

    daemon: tuple[str, ...] = ("/usr/bin/qemu-storage-daemon",)
    image: tuple[str, ...] = ("/usr/bin/qemu-img",)


class Daemon:
    """A running daemon with the node ``wire``. ``ended`` gets in words why it is gone."""

    def __init__(
        self,
        reactor: Reactor,
        children: Children,
        programs: Programs,
        node: Callable[[int], Mapping[str, Any]],
        descriptor: int,
        ended: Callable[[str], None],
    ) -> None:
        self._children, self._on_end = children, ended
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda _name, _data: None
        self._greeted, self._deleted = False, set[str]()
        self._jobs: dict[str, str] = {}  # how far each is, by its events
        ours, theirs = socket.socketpair()
        with theirs:
            argv = _command_line(programs, theirs.fileno(), node(descriptor))
            self._pid = children.start(argv, [theirs.fileno(), descriptor], self._ended)
        self._qmp = Qmp(reactor, ours, self._event, lambda: None)
        self._wait_for_greeting()

    @property
    def pid(self) -> int:
        """Its process id; 0 when it has ended."""
        return self._pid

    def _wait_for_greeting(self) -> None:
        try:
            ready = self._qmp.wait(lambda: self._greeted, START_S)
        except Gone as error:
            message = "the device does not answer as an NBD server should"
            hint = "the service's log has the storage daemon's own words"
            raise Invalid(message, hint=hint) from error
        if not ready:
            self.kill()
            raise Temporary("the device did not answer in time")

    def ask(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """A command's result; QEMU's refusal as an error of ours.

        One that does not answer is asked nothing more until it has: all volumes would wait.
        """
        if self._qmp.is_behind:
            raise Temporary("the volume's storage daemon has not answered what it was asked before")
        try:
            return self._qmp.ask(name, arguments)
        except Refused as error:
            raise in_our_words(str(error)) from error
        except Gone as error:
            raise Temporary("the volume's storage daemon has ended") from error

    def nodes(self) -> dict[str, dict[str, Any]]:
        """What ``query-named-block-nodes`` says, by name."""
        found = self.ask("query-named-block-nodes", {"flat": True})
        return {node["node-name"]: node for node in found}

    def run_job(self, command: str, arguments: dict[str, Any]) -> None:
        """Start a short job and wait for its end; its error is raised."""
        job = "short"
        self._jobs.pop(job, None)
        self.ask(command, {"job-id": job, **arguments})
        if not self._qmp.wait(lambda: self._jobs.get(job) == "concluded", START_S):
            raise Temporary(f"{command} takes too long")
        error = self.end_job(job)
        if error:
            raise in_our_words(error)

    def job(self, job: str) -> dict[str, Any]:
        """What ``query-jobs`` says of a job; empty when there is none."""
        return next((j for j in self.ask("query-jobs") if j["id"] == job), {})

    def end_job(self, job: str) -> str:
        """Dismiss a job that has concluded: its error, or nothing."""
        error = str(self.job(job).get("error", ""))
        self.ask("job-dismiss", {"id": job})
        return error

    # -- exports

    def serve_nbd(self, node: str, name: str, *, writable: bool) -> str:
        """Export a node by NBD: the address. One export at a time."""
        address = names.fresh_address()
        place = {"type": "unix", "data": {"path": address, "abstract": True}}
        self.ask("nbd-server-start", {"addr": place})
        try:
            self._add_export({"type": "nbd", "node-name": node, "name": name, "writable": writable})
        except SupercloudError:
            self.ask("nbd-server-stop")
            raise
        return address

    def end_nbd(self) -> None:
        """No more NBD."""
        self._remove_export("nbd")
        self.ask("nbd-server-stop")

    def serve_vhost(self, node: str, *, writable: bool) -> str:
        """Export a node as a vhost-user-blk device: the address.

        Such a device shows a machine no cache, and is sent no flushes, until the machine switches
        one on: up to then everything is written through, or a kill would lose what was synced.
        """
        address = names.fresh_address()
        export = {"type": "vhost-user-blk", "node-name": node, "writable": writable}
        self._add_export(export | {"addr": names.unix(address), "writethrough": True})
        return address

    def end_vhost(self) -> None:
        """No more vhost-user-blk."""
        self._remove_export("vhost-user-blk")

    def _add_export(self, export: dict[str, Any]) -> None:
        self.ask("block-export-add", {"id": export["type"], **export})

    def _remove_export(self, name: str) -> None:
        self._qmp.wait(lambda: not self._qmp.is_behind, _DELETED_S)
        self._deleted.discard(name)
        self.ask("block-export-del", {"id": name, "mode": "hard"})
        if not self._qmp.wait(lambda: name in self._deleted, _DELETED_S):
            raise Temporary(f"the {name} export does not end: requests are still under way")

    # -- the end

    def quit(self) -> None:
        """End in order: all that was acknowledged is on the device, bitmaps are kept."""
        self._on_end = lambda _why: None
        self._qmp.command("quit")
        try:
            in_time = self._qmp.wait(lambda: not self._qmp.is_open, QUIT_S)
        except Gone:
            in_time = True
        if not in_time:
            log.warning("a storage daemon did not end in time, it is killed")
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._pid:
            self._children.kill(self._pid)

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "GREETING":
            self._greeted = True
        elif name == "BLOCK_EXPORT_DELETED":
            self._deleted.add(str(data.get("id")))
        elif name == "JOB_STATUS_CHANGE":
            self._jobs[str(data.get("id"))] = str(data.get("status"))
        self.on_event(name, data)

    def _ended(self, status: int) -> None:
        self._pid = 0
        self._qmp.close()
        self._on_end(how_it_ended(status))


def connect(address: str) -> socket.socket:
    """A connection to an export."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"\0{address}")
    except OSError as error:
        sock.close()
        raise Temporary(f"the export does not answer: {error}") from error
    return sock


def in_our_words(said: str) -> SupercloudError:
    """An error of ours for what QEMU said."""
    for pattern, kind in _MEANINGS:
        if re.search(pattern, said, re.IGNORECASE):
            return kind(f"the storage daemon refused: {said}")
    return Refused(f"the storage daemon refused: {said}")


def _command_line(programs: Programs, monitor: int, node: Mapping[str, Any]) -> list[str]:
    return [
        *programs.daemon,
        *("--chardev", f"socket,id=qmp,fd={monitor}", "--monitor", "chardev=qmp"),
        *("--object", f"throttle-group,id={names.GROUP}"),
        *("--blockdev", json.dumps(node)),
    ]
