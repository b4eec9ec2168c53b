"""Who a platform is: told at boot, or, in a clone of a template, when it wakes up as a new one.

A template is a platform that has booted as nobody: no boot data, no key, no address. Its
agent loads what a platform needs and waits at the virtio port ``supercloud.identity``. A clone goes
on from there in a copy of that memory, so everything that must differ is made anew before anything
else happens: the kernel's random numbers (and, by their generation, those of every process), the
clock, the MACs. Then it reads its own boot data as any platform does.

What stays common to the clones of a template: the kernel's address space layout, and the key of
Python's hashes in this process and process 1.
"""

import asyncio
import codecs
import contextlib
import fcntl
import gc
import hashlib
import json
import logging
import os
import struct
import sys
import time
from typing import Annotated, Final

from supercloud.model.errors import Invalid, NotFound, SupercloudError
from supercloud.model.records import dataclass
from supercloud.trust import libcrypto, tls
from supercloud.upper.platform.agent import (
    bootdata,
    iso9660,
    netlink,
    networks,
    nftables,
    obstacles,
    paths,
    prefetch,
    prepared,
    scratch,
    uplink,
)
from supercloud.upper.platform.agent.accelerator import Accelerator
from supercloud.upper.platform.agent.bootdata import disk
from supercloud.upper.platform.agent.processes import load_modules, run
from supercloud.upper.platform.agent.state import write_private
from supercloud.wire.codec import Limit, decode, learn
from supercloud.wire.lease import Lease
from supercloud.wire.messages import AGENT_TO_CONTROL, CONTROL_TO_AGENT

MODULES: Final = (*networks.MODULES, *scratch.MODULES, "isofs", "loop")
PORT: Final = "supercloud.identity"
_ARGUMENT: Final = "supercloud.start=template"
_PORTS: Final = "/sys/class/virtio-ports"
_MACHINE_ID: Final = "/etc/machine-id"
_MAX_LINE_BYTES: Final = 4096
SETTLE_S: Final = 3.0
"""What the kernel put off (writing back, freeing, grace periods) every clone would do again."""
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x4008_5203, 0x5207
MAC: Final = r"02:5c:(00|77)(:[0-9a-f]{2}){3}"

log = logging.getLogger("supercloud.agent.identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the host's side says to a clone."""

    version: Annotated[int, Limit(ge=1, le=1)]
    nonce: Annotated[str, Limit(pattern=r"[0-9a-f]{16}")]
    seed: Annotated[str, Limit(pattern=r"[0-9a-f]{128}")]
    time_s: float
    macs: Annotated[list[Annotated[str, Limit(pattern=MAC)]], Limit(max_length=4)]
    lease: Lease | None = None  # none from a host of before


def is_template() -> bool:
    """Whether this platform has booted to become a template, and nobody has been born of it yet."""
    with open("/proc/cmdline") as file:
        waits = _ARGUMENT in file.read().split()
    return waits and not os.path.exists(paths.IDENTIFIED)


class Waiting:
    """The port of a template; ``become`` returns in a clone, ``confirm`` tells that it is one.

    ``config`` is the device of the config disk, ``lease`` what the uplink is to be.
    """

    def __init__(self) -> None:
        self._port = os.open(port(), os.O_RDWR | os.O_CLOEXEC)
        self.config = disk("config")
        self.lease: Lease | None = None
        self.nics: uplink.Nics = (None, None)
        self._nonce = ""

    def become(self) -> None:
        """Wait, for as long as it takes, and be another."""
        self.nics = asyncio.run(prepare())
        gc.collect()
        gc.freeze()  # the collector would write to each object, and so copy its page in each clone
        time.sleep(SETTLE_S)
        os.write(self._port, b"waiting\n")
        told = parse(self._line())
        reseed(bytes.fromhex(told.seed))
        time.clock_settime(time.CLOCK_REALTIME, told.time_s)
        set_macs(told.macs, self.nics)
        write_private(paths.IDENTIFIED, "")  # an agent that takes over from us does not wait
        self._nonce, self.lease = told.nonce, told.lease

    def confirm(self) -> int:
        """From now on this platform may be given work; the port, for ``quiet``."""
        os.write(self._port, f"ready {self._nonce}\n".encode())
        return self._port

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
            more = os.read(self._port, _MAX_LINE_BYTES)
            if not more:
                time.sleep(0.01)  # nobody has opened the other end yet
            line += more
        return line


def port() -> str:
    """The port's device node; Invalid when the machine has none."""
    for name in sorted(os.listdir(_PORTS)) if os.path.isdir(_PORTS) else ():
        with open(f"{_PORTS}/{name}/name") as file:
            if file.read().strip() == PORT:
                return f"/dev/{name}"
    raise Invalid(f"a template without the port {PORT}")


def parse(untrusted: bytes) -> Told:
    """Check what came; Invalid."""
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise Invalid("an identity that is not JSON") from error
    return decode(Told, value, "identity", ignore_unknown=True)


async def prepare() -> uplink.Nics:
    """What every clone would do for itself, as far as it has nothing to do with who it is."""
    networks.prepare_kernel()
    nics = uplink.bring_up(address="")
    accelerator = Accelerator()

    async def environments() -> None:
        await prepared.prepare(accelerator, nics[1].name if nics[1] else "none")

    for step in (_load_modules, accelerator.probe, _read_programs, environments, _scratch):
        try:
            await step()
        except (SupercloudError, OSError) as error:
            log.warning("%s: %s", step.__qualname__, error)
    await asyncio.to_thread(rehearse)  # so that there is no first thread either
    return nics


def rehearse() -> None:
    """Go through what a clone does first, as nobody: what is looked up once stays looked up.

    Classes' annotations, compiled patterns, OpenSSL's algorithms. Nothing made here is used.
    """
    lease = {"address": "192.0.2.2/24", "gateway": "192.0.2.1", "resolvers": []}
    example = {"version": 1, "nonce": "0" * 16, "seed": "0" * 128, "time_s": 0, "macs": []}
    example["lease"] = lease
    parse(json.dumps(example).encode())
    with open(_MACHINE_ID, "w"):
        pass  # the place for it; who says what it is, is somebody
    reseed(os.urandom(64))
    set_macs([])
    codecs.lookup(iso9660.NAME_ENCODING)
    with contextlib.suppress(Invalid):  # an empty disk
        bootdata.load_directly(disk("config"))
    bootdata.parse(json.dumps(bootdata.EXAMPLE).encode())
    for method in (*AGENT_TO_CONTROL.values(), *CONTROL_TO_AGENT.values()):
        learn(method.params, method.result)
    if libcrypto.is_there():
        libcrypto.rehearse()
    tls.bare_context()
    obstacles.of_checkpoints()
    if nftables.is_there():
        nftables.apply("list tables")


async def _load_modules() -> None:
    await load_modules(*MODULES)


async def _scratch() -> None:
    with contextlib.suppress(NotFound):  # a platform without one
        await scratch.prepare()


async def _read_programs() -> None:
    """Into the page cache, which the clones share; of QEMU and its libraries what its start needs.

    All of them would be a third of the template.
    """
    for path in (*prefetch.ENROLMENT, *prefetch.CONTAINERS):
        if os.path.exists(path):
            with open(path, "rb") as file:
                while file.read(1 << 20):
                    pass
    await run("qemu-system-x86_64", "--version")


def reseed(seed: bytes) -> None:
    """Let the kernel's generator, and the libraries that have one of their own, start anew.

    The seed is credited as entropy; what this machine has of its own (time stamp counter, what its
    pool had) is mixed in. RNDRESEEDCRNG raises the generation, which makes each processor's
    generator, and those that the vDSO keeps in processes, take new keys at their next use.
    """
    own = hashlib.sha512(seed + struct.pack("=qq", time.perf_counter_ns(), time.time_ns()))
    mixed = seed + own.digest()
    device = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
    try:
        info = struct.pack("=ii", 8 * len(seed), len(mixed)) + mixed
        fcntl.ioctl(device, _RNDADDENTROPY, info)
        fcntl.ioctl(device, _RNDRESEEDCRNG)
    finally:
        os.close(device)
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "ssl" in sys.modules:  # its generators look whether the one they come from has new keys
        sys.modules["ssl"].RAND_add(os.urandom(64), 64.0)


def set_macs(macs: list[str], known: uplink.Nics | None = None) -> None:
    """Give each NIC the address of its kind; the guest keeps a template's, whatever the device."""
    with netlink.Netlink() as sock:
        for nic in known or uplink.find_nics(sock.links()):
            for mac in macs:
                if nic is not None and mac[:8] == nic.mac[:8]:
                    sock.set_mac(nic.index, mac)


def ensure_machine_id() -> None:
    """A machine id of this platform's own, once it is somebody."""
    file = os.open(_MACHINE_ID, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not os.fstat(file).st_size:
            os.write(file, f"{os.urandom(16).hex()}\n".encode())
    finally:
        os.close(file)
