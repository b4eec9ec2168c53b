"""CRIU, driven by its own protocol: one process (``criu swrk``) for a dump or a restore.

Messages are protocol buffers over a packet socket; we write those few fields that we use and read
fewer. CRIU calls back at its stages and waits for us: at ``setup-namespaces`` of a restore the
namespaces are there and nothing has been opened in them yet.

Source: CRIU 4.1, images/rpc.proto and criu/cr-service.c.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from supercloud.model.errors import Permanent, Temporary
from supercloud.model.records import dataclass, field
from supercloud.upper.platform.agent import cgroups
from supercloud.upper.platform.agent.processes import load_modules, run, set_oom_score

MODULES: Final = (
    "unix_diag", "inet_diag", "tcp_diag", "udp_diag", "netlink_diag", "af_packet_diag",
)  # fmt: skip
LOG_NAME: Final = "criu.log"
_CLONE_NEWNET: Final = 0x4000_0000
_DUMP, _RESTORE, _NOTIFY = 1, 2, 6
_CGROUPS_NONE: Final = 1  # leave the groups' properties alone, but put tasks into theirs
_LOCK_SKIP: Final = 3
_MAX_PACKET_BYTES: Final = 1 << 16
_TIMEOUT_S: Final = 120.0

Notified = Callable[[str, int], Awaitable[None]]
"""Called with the stage and the number of the first process."""


@dataclass(frozen=True, slots=True)
class Options:
    """``external`` are resources that are not CRIU's to save; ``inherit`` replaces such files."""

    images: int  # a descriptor of the directory
    external: Sequence[str] = ()
    pid: int = 0
    cgroup: str = ""  # of a dump: to be frozen, or frozen already; of a restore: the new root
    root: str = ""
    inherit: Mapping[str, int] = field(default_factory=dict)

    def packed(self, *, restore: bool) -> bytes:
        """As ``criu_opts``."""
        fields: list[tuple[int, int | str | bytes]] = [
            (1, self.images), (8, 1), (9, 2), (10, LOG_NAME), (12, 1), (34, _CGROUPS_NONE),
            (38, _CLONE_NEWNET), (52, 1), (64, _LOCK_SKIP), *((37, e) for e in self.external),
        ]  # fmt: skip
        if restore:
            fields += [(13, self.root), (25, message((2, self.cgroup)))]
            fields += [(27, message((1, k), (2, fd))) for k, fd in self.inherit.items()]
        else:
            fields += [(2, self.pid), (3, 1), (44, self.cgroup), (46, 1)]
        return message(*fields)


async def dump(options: Options, log_path: str) -> None:
    """Write the images of a process tree; it goes on as it was. Permanent with CRIU's reason.

    Whoever does not want it any more waits all the same: killed amidst it, CRIU would leave the
    processes with code of its own in them.
    """
    packed = options.packed(restore=False)
    work = asyncio.ensure_future(_serve(_DUMP, packed, [options.images], "", None, log_path))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


async def restore(options: Options, group: str, notified: Notified, log_path: str) -> int:
    """Make the process tree again, in the control group of an EE; its first process' number."""
    inherited = [options.images, *options.inherit.values()]
    packed = options.packed(restore=True)
    return await _serve(_RESTORE, packed, inherited, group, notified, log_path)


async def check() -> None:
    """Permanent, with the reason, when this platform cannot do it."""
    await load_modules(*MODULES)
    await run("criu", "check")


async def _serve(
    kind: int, options: bytes, inherited: Sequence[int], group: str, notified: Notified | None,
    log_path: str,
) -> int:  # fmt: skip
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, contextlib.ExitStack() as opened:
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                "criu", "swrk", str(theirs.fileno()), pass_fds=[theirs.fileno(), *inherited],
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL, cwd="/",
            )  # fmt: skip
        opened.callback(_end, process)
        set_oom_score(process.pid, 0)  # what is restored would have ours
        if group:
            cgroups.enter(cgroups.path_of(group), process.pid)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                number = await _converse(ours, kind, options, notified, log_path)
                ours.close()
                await process.wait()
        except TimeoutError:
            raise Temporary("CRIU did not end in time") from None
        return number


def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


async def _converse(
    channel: socket.socket, kind: int, options: bytes, notified: Notified | None, log_path: str
) -> int:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(channel, message((1, kind), (2, options)))
    while True:
        packet = await loop.sock_recv(channel, _MAX_PACKET_BYTES)
        answer = dict(fields(packet))
        if answer.get(1) == _NOTIFY:
            told = dict(fields(_bytes(answer.get(5))))
            if notified is not None:
                await notified(_bytes(told.get(1)).decode(), _number(told.get(2)))
            await loop.sock_sendall(channel, message((1, _NOTIFY), (3, 1)))
        elif not packet or answer.get(1) != kind or not answer.get(2):
            raise Permanent(f"CRIU: {complaint(log_path) or 'it failed without a word'}")
        else:
            found = dict(fields(_bytes(answer.get(4)))) if kind == _RESTORE else {}
            return _number(found.get(1))


def complaint(log_path: str) -> str:
    """The first error in CRIU's log: those after it follow from it."""
    with contextlib.suppress(OSError), open(log_path, errors="replace") as file:
        for line in file:
            if "Error (" in line:
                return line.partition("Error (")[2].partition("): ")[2].strip()[:500]
    return ""


# -- protocol buffers, wire types 0 (numbers) and 2 (bytes)


def message(*given: tuple[int, int | str | bytes]) -> bytes:
    """Encode fields."""
    out = bytearray()
    for number, value in given:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return bytes(out)


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Decode fields; Permanent for what is not of these two types."""
    at = 0
    try:
        while at < len(data):
            key, at = _read_varint(data, at)
            value, at = _read_varint(data, at)
            if key & 7 == 0:
                yield key >> 3, value
            elif key & 7 == 2 and at + value <= len(data):
                yield key >> 3, data[at : at + value]
                at += value
            else:
                raise Permanent("CRIU's answer makes no sense")
    except IndexError:
        raise Permanent("CRIU's answer is cut short") from None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
