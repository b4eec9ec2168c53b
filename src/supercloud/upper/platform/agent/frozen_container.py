"""Checkpoints of containers: CRIU's images of the processes, and the layer that they write to.

A container under crun is dumped as it is: its user namespace, its seccomp filter, its mounts. Three
things are not CRIU's to save and are put in its place again: its root (an overlay that the agent
mounts), what is bound into it from the platform, and the FIFO that its output goes to. Nor is its
network namespace: connections are closed by a checkpoint's restore anyhow, and the agent gives the
new namespace the same address, MAC and gateway before a process of the container is there.

In a restore crun makes the container once more, with its control group, limits and device filter,
and its first process, which has not begun yet, makes room for the one that comes back.
"""

import contextlib
import json
import os
import re
import signal
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from supercloud.model.errors import BadState, Invalid, Permanent, Temporary, Unsupported
from supercloud.upper.platform.agent import (
    cgroups,
    criu,
    crun,
    namespaces,
    oci,
    paths,
    standstill,
    volumes,
)
from supercloud.upper.platform.agent.processes import Watched, run, start_ticks
from supercloud.upper.platform.agent.saving import (
    ANSWER_TIMEOUT_S,
    PAUSE_TIMEOUT_S,
    saver,
    workplace,
)
from supercloud.upper.platform.agent.state import read_json, remove_tree, write_json
from supercloud.upper.platform.saver.requests import Captured, Found, Ready, Restore, Take, Write
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken

if TYPE_CHECKING:
    from supercloud.upper.platform.agent.container import Container
    from supercloud.upper.platform.agent.engine import Services

ENGINE = "criu"
FREEZE_TIMEOUT_S = 10.0
UNTRACED_TIMEOUT_S = 120.0
CREATE_TIMEOUT_S = 60.0
_DEVICES = ("null", "zero", "full", "tty", "random", "urandom")
_OUTPUT = re.compile(r"file\[[0-9a-f]{1,16}:[0-9a-f]{1,16}\]")
_USERNS_MAGIC = (0x54564319, 0x55474906)


def refusal() -> str:
    """Why no container can be checkpointed here; empty if they can."""
    if not os.path.exists("/usr/sbin/criu"):
        return "CRIU is not in this image"
    return ""


async def take(
    container: "Container", wanted: CheckpointTake, services: "Services", process: Watched
) -> CheckpointTaken:
    """A checkpoint of a running one, which stands still for a moment."""
    await criu.check()
    standstill.check(container.spec, wanted)
    uid, group = container.spec.uid, cgroups.path_of(container.spec.uid)
    with workplace(uid) as place:
        os.mkdir(f"{place}/criu", 0o700)
        request = Take(
            ucloud=services.ucloud, ee=wanted.name, engine=ENGINE, store=wanted.store,
            head=wanted.head, directory=place, layer=f"{container.places.layer}/upper",
            owner=container.base_id, details={"spec": fingerprint(container)},
        )  # fmt: skip
        async with saver(log_path=f"{container.places.run}/saver.log") as helper:
            await helper.ask("take", request, Ready, ANSWER_TIMEOUT_S)
            check_processes(group, process.pid)
            await standstill.ahead(services.volumes, uid)
            begun_s = time.monotonic()
            try:
                await _freeze(group)
                dumping = _dump(container, process.pid, group, place)
                keeping = standstill.keep(services.volumes, wanted, services.snapshot)
                details = await standstill.together(dumping, keeping)
                await helper.ask("capture", None, Captured, PAUSE_TIMEOUT_S)
            finally:
                cgroups.thaw(uid)
            pause_ms = (time.monotonic() - begun_s) * 1000
            taken = await helper.ask(
                "write", Write(details=details), CheckpointTaken, ANSWER_TIMEOUT_S
            )
    return paused(taken, pause_ms)


async def recover(container: "Container") -> None:
    """Have it go on after an agent that was killed in the middle of a checkpoint.

    CRIU does not die with the agent, which would do harm to what it holds; it leaves everything as
    it found it, and that was frozen.
    """
    await cgroups.untraced(container.spec.uid, UNTRACED_TIMEOUT_S)
    cgroups.thaw(container.spec.uid)


def paused(taken: CheckpointTaken, pause_ms: float) -> CheckpointTaken:
    """With how long it stood still."""
    return replace(taken, pause_ms=round(pause_ms, 3))


def check_processes(group: str, first: int) -> None:
    """BadState when some process of the group does not descend from the first."""
    with open(f"{group}/cgroup.procs") as file:
        members = [int(line) for line in file]
    parents = {pid: _parent(pid) for pid in members}
    for pid in members:
        at = pid
        while at != first and at in parents:
            at = parents[at]
        if at != first and parents[pid]:
            raise BadState(
                "a program that was started from outside runs in it, and would not be restored",
                hint="end the exec sessions, then take the checkpoint",
            )


def _parent(pid: int) -> int:
    """0 when it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


async def _freeze(group: str) -> None:
    try:
        await cgroups.freeze(group, FREEZE_TIMEOUT_S)
    except TimeoutError:
        raise Temporary("it did not come to a stand") from None


async def _dump(container: "Container", pid: int, group: str, place: str) -> dict[str, str]:
    """Dump it; it stays frozen. What a restore has to know."""
    output = output_of(pid, f"{container.places.run}/output")
    mounts = _bound_mounts(pid, {volume.path for volume in container.spec.volumes})
    external = [output, *(f"mnt[{path}]:{path}" for path in mounts)]
    images = os.open(f"{place}/criu", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        options = criu.Options(images=images, external=external, pid=pid, cgroup=group)
        await criu.dump(options, f"{place}/criu/{criu.LOG_NAME}")
    finally:
        os.close(images)
    os.unlink(f"{place}/criu/{criu.LOG_NAME}")
    return {"output": output, "mounts": json.dumps(mounts, separators=(",", ":"))}


def output_of(pid: int, fifo: str) -> str:
    """CRIU's name for the FIFO: by the mount that it was opened through, and its inode.

    Unsupported when neither output of the process is that any more: what would be put in its place
    later is something else.
    """
    for number in (1, 2):
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samefile(f"/proc/{pid}/fd/{number}", fifo):
                continue
            with open(f"/proc/{pid}/fdinfo/{number}") as file:
                told = dict(line.split(":\t") for line in file.read().splitlines() if ":\t" in line)
            return f"file[{int(told['mnt_id']):x}:{int(told['ino']):x}]"
    raise Unsupported("its first program has closed its output, or writes it elsewhere")


def _bound_mounts(pid: int, volumes: set[str]) -> dict[str, str]:
    """Mount points that show something of the platform: a device's name, or empty for ours.

    ``volumes`` are those of volumes, each a file system of its own.
    """
    found = {}
    with open(f"/proc/{pid}/mountinfo") as file:
        for line in file:
            words, _, more = line.partition(" - ")
            root, target = words.split()[3:5]
            kind = more.split()[0]
            if target == "/":
                continue
            if kind == "devtmpfs":
                found[target] = root.removeprefix("/")
            elif kind not in ("proc", "sysfs", "cgroup2", "devpts", "mqueue") and (
                root != "/" or target in volumes
            ):
                found[target] = ""
    return found


def fingerprint(container: "Container") -> str:
    """What must be the same where it is restored: the image."""
    return container.spec.image.blobs["root"].digest


# -- restore


def _marker(container: "Container") -> str:
    return f"{container.places.run}/restored"


def is_due(container: "Container") -> bool:
    """Whether its next start is from a checkpoint."""
    return container.spec.restore is not None and not os.path.exists(_marker(container))


def done(container: "Container") -> None:
    """It runs: from now on it starts as any other."""
    write_json(_marker(container), True)
    remove_tree(f"{container.places.layer}/restore")


async def fetch(container: "Container", ucloud: str) -> None:
    """Read and verify the whole checkpoint; its layer in place. Refused leaves nothing."""
    wanted, layer = container.spec.restore, container.places.layer
    place, upper = f"{layer}/restore", f"{layer}/upper"
    if wanted is None or os.path.exists(f"{place}/details"):
        return
    if reason := refusal():
        raise Unsupported(f"{container.spec.name} cannot be restored: {reason}")
    remove_tree(place)
    remove_tree(upper)
    try:
        for path in (place, upper):
            os.makedirs(path, mode=0o700)
        request = Restore(
            ucloud=ucloud, ee=wanted.ee, store=wanted.store, head=wanted.head,
            sequence=wanted.sequence, directory=place, layer=upper, owner=container.base_id,
        )  # fmt: skip
        async with saver(log_path=f"{container.places.run}/saver.log") as helper:
            found = await helper.ask("restore", request, Found, ANSWER_TIMEOUT_S)
            _check(container, found)
            await helper.ask("fetch", None, dict, ANSWER_TIMEOUT_S)
        write_json(f"{place}/details", found.details)
    except BaseException:
        remove_tree(place)
        remove_tree(upper)
        raise


def _check(container: "Container", found: Found) -> None:
    if found.engine != ENGINE:
        raise Invalid(f"checkpoint {found.sequence} is of {found.engine}, not of a container")
    if found.details.get("spec") != fingerprint(container):
        raise Invalid(f"checkpoint {found.sequence} is of another image",
                      hint="restore it with the image that it had")  # fmt: skip
    _externals(container, found.details)
    _output_in(found.details)


async def restore(container: "Container", output: int) -> Watched:
    """Start it as the checkpoint left it."""
    place, layer, uid = container.places.run, container.places.layer, container.spec.uid
    details: dict[str, str] = read_json(f"{layer}/restore/details", {})
    images_path = f"{layer}/restore/criu"
    log_path = f"{images_path}/{criu.LOG_NAME}"
    await criu.check()
    await cgroups.remove(uid)  # of a try that was cut short
    remove_tree(f"{paths.CRUN}/{uid}")
    await _make_room(container, output)
    _move_owners(images_path, container.base_id)
    launched_s = time.monotonic()
    os.chmod(images_path, 0o755)  # CRIU reads on as the container's root; above it is ours alone
    images = os.open(images_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    async def notified(stage: str, pid: int) -> None:
        if stage == "setup-namespaces":
            namespaces.take_over(f"{place}/ns", pid)
            namespaces.set_sysctls(f"{place}/ns", oci.SYSCTLS)
            container.attach_network()

    try:
        options = criu.Options(
            images=images, external=_externals(container, details), root=container.root,
            cgroup=f"/ee/{uid}", inherit={_output_in(details): output},
        )  # fmt: skip
        pid = await criu.restore(options, uid, notified, log_path)
    finally:
        os.close(images)
    _tell_crun(uid, pid)
    return Watched(pid, launched_s)


def _externals(container: "Container", untrusted: dict[str, str]) -> list[str]:
    """What is bound where, from this platform's own specification of the EE."""
    place = container.places.run
    ours = {f"/etc/{name}": f"{place}/{name}" for name in (*oci.FILES, oci.CA_FILE)}
    ours |= {v.path: volumes.view(place, v.volume) for v in container.spec.volumes}
    found = []
    for target, device in _mounts_in(untrusted).items():
        source = f"/dev/{device}" if device in _DEVICES else ours.get(target, "")
        if not source:
            raise Invalid(f"the checkpoint has something mounted at {target!r:.200}")
        found.append(f"mnt[{target}]:{source}")
    return found


def _mounts_in(untrusted: dict[str, str]) -> dict[str, str]:
    """What was bound into it, as ``_bound_mounts`` found it; Invalid."""
    try:
        found = json.loads(untrusted.get("mounts", ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(what, str) for what in found.values()):
        raise Invalid("the checkpoint does not say what was mounted in its container")
    return found


def _output_in(untrusted: dict[str, str]) -> str:
    """CRIU's name for what its output went to; Invalid."""
    name = untrusted.get("output", "")
    if not _OUTPUT.fullmatch(name):
        raise Invalid("the checkpoint does not say where the output of its container went")
    return name


async def _make_room(container: "Container", output: int) -> None:
    """A container of crun's whose process has ended before its program began."""
    uid, place = container.spec.uid, container.places.run
    await run(
        *crun.ARGUMENTS, "--log", f"{place}/crun.log", "create", "--bundle", place,
        "--pid-file", f"{place}/pid", uid, timeout_s=CREATE_TIMEOUT_S, stdout=output, stderr=output,
        **crun.spawning(),
    )  # fmt: skip
    with open(f"{place}/pid") as file:
        placeholder = Watched(int(file.read()), time.monotonic())
    placeholder.send(signal.SIGKILL)
    ended = await placeholder.ended_within(FREEZE_TIMEOUT_S)
    placeholder.close()
    if not ended:
        raise Permanent("crun's first process did not end")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{paths.CRUN}/{uid}/exec.fifo")


def _move_owners(images: str, base_id: int) -> None:
    """The user namespace's map in CRIU's images becomes that of the range which the EE has here."""
    extent = criu.message((1, 0), (2, base_id), (3, namespaces.IDS_PER_ENVIRONMENT))
    entry = criu.message((1, extent), (2, extent))
    for name in os.listdir(images):
        if name.startswith("userns-"):
            with open(f"{images}/{name}", "wb") as file:
                file.write(struct.pack("<3I", *_USERNS_MAGIC, len(entry)) + entry)


def _tell_crun(uid: str, pid: int) -> None:
    """Its record of the container names the process that has come back."""
    path = f"{paths.CRUN}/{uid}/status"
    status: dict[str, Any] = read_json(path, {})
    write_json(path, {**status, "pid": pid, "process-start-time": start_ticks(pid)})
