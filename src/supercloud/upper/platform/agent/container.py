"""Containers, by crun: one process per start, all else is done from here by system calls."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from supercloud.model.errors import Invalid, Permanent
from supercloud.upper.platform.agent import (
    cgroups,
    crun,
    frozen_container,
    namespaces,
    networks,
    oci,
    paths,
    prefetch,
    rootfs,
    syscalls,
    users,
)
from supercloud.upper.platform.agent.engine import Places, Services, not_restored
from supercloud.upper.platform.agent.logs import Fifo, Log
from supercloud.upper.platform.agent.processes import Watched, handles, run
from supercloud.upper.platform.agent.state import remove_tree, write_private
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken
from supercloud.wire.messages import Blob, EnvironmentSpec, VolumeUsage

START_TIMEOUT_S = 60.0
READ_AHEAD_BYTES = 16 << 20  # of an image, in a template
_ATTACHED = "attached"


class Container:
    """An EE of kind container."""

    def __init__(self, spec: EnvironmentSpec, services: Services, base_id: int) -> None:
        self.spec, self._services, self.base_id = spec, services, base_id
        self.places = Places(spec.uid)
        self.log: Log | None = None
        self.started_from = ""
        self._fifo: Fifo | None = None

    @property
    def name(self) -> str:
        """The engine."""
        return "crun"

    @property
    def root(self) -> str:
        """Its root as the platform sees it."""
        return f"{self.places.run}/rootfs"

    async def prepare(self) -> None:
        """Image here and mounted, root, namespaces with their network, configuration."""
        image, place = self._image(), self.places.run
        await self._services.scratch.ready()
        await self._services.blobs.get(image)
        self.places.make(self.base_id)
        namespaces.create(self.base_id, f"{place}/ns")
        if frozen_container.is_due(self):
            with not_restored():
                await frozen_container.fetch(self, self._services.ucloud)
        rootfs.mount_root(image.digest, place, self.places.layer, self.base_id)
        if not self._was_attached():
            self.attach_network()
        await self.resume()

    def attach_network(self) -> None:
        """Give its network namespace what it has to have."""
        place = f"{self.places.run}/ns"
        self._services.networks.attach(self.spec.uid, self.spec.nics, place)

    def _was_attached(self) -> bool:
        """Whether the template has done so; asked once, for what fails later may be the network."""
        try:
            os.unlink(f"{self.places.run}/{_ATTACHED}")
        except FileNotFoundError:
            return False
        return True

    def _image(self) -> Blob:
        image = self.spec.image.blobs.get("root")
        if self.spec.image.format != "erofs" or image is None:
            raise Invalid(f"a container cannot run from a {self.spec.image.format} image")
        return image

    async def start_ahead(self, _timeout_s: float) -> None:
        """In a template: all that is not on scratch."""
        place = self.places.run
        await self._services.blobs.get(self._image())
        self.places.make_run(self.base_id)
        namespaces.create(self.base_id, f"{place}/ns")
        prefetch.read_tree(rootfs.mount_image(self._image().digest), READ_AHEAD_BYTES)
        self.attach_network()
        await self._rehearse()
        write_private(f"{place}/{_ATTACHED}", "")

    async def _rehearse(self) -> None:
        """Run a program that is not there, in a root in memory, of which nothing is left.

        crun keeps the filter of system calls that it has made, which is much of its work, and the
        kernel has then done once what it will have to do for the container.
        """
        place = self.places.run
        layer = f"{place}/rehearsal"
        os.makedirs(layer, exist_ok=True)
        syscalls.mount("tmpfs", layer, "tmpfs", syscalls.MS_NOSUID, "mode=0700,size=1m")
        try:
            rootfs.mount_root(self._image().digest, place, layer, self.base_id)
            nobody = users.User(uid=0, gid=0, groups=[], home="/")
            self._write_files(oci.process(["/nothing"], [], "", nobody))
            with contextlib.suppress(Permanent):
                await self._run_crun()
            await self.ended()
        finally:
            rootfs.unmount_root(place)
            syscalls.unmount(layer)
            os.rmdir(layer)

    async def attach(self, waiting: Callable[[str], None]) -> None:
        """Its volumes mounted, new ones made; they are bound by the configuration."""
        volumes, place = self._services.volumes, self.places.run
        await volumes.claim(self, place, waiting)
        if self.spec.volumes:
            user = self._user()
            await volumes.mount(self.spec.uid, place, (user.uid, user.gid), waiting)

    async def lost(self) -> None:
        """Absent when a volume goes; file systems grow with their disks."""
        await self._services.volumes.lost(self.spec.uid, self._services.volumes.grow)

    async def returned(self) -> None:
        """When all its volumes can be had."""
        await self._services.volumes.returned(self)

    def refusal(self) -> str:
        """Why it cannot be checkpointed; empty if it can."""
        return frozen_container.refusal()

    async def checkpoint(self, wanted: CheckpointTake, process: Watched) -> CheckpointTaken:
        """Take one while it runs."""
        return await frozen_container.take(self, wanted, self._services, process)

    def usage(self) -> list[VolumeUsage]:
        """As statvfs(2) has it."""
        return self._services.volumes.usage(self.spec.uid)

    def _user(self) -> users.User:
        spec = self.spec
        return users.resolve(spec.process.user or spec.image.process.user, self.root)

    def _write_files(self, first: dict[str, Any]) -> None:
        place, spec = self.places.run, self.spec
        resolvers = "".join(f"nameserver {nic.gateway}\n" for nic in spec.nics[:1])
        own = "".join(f"{nic.address.partition('/')[0]} {spec.name}\n" for nic in spec.nics[:1])
        local = "127.0.0.1 localhost\n::1 localhost\n"
        if spec.objects:
            own += "".join(f"{nic.gateway} {spec.objects.server_name}\n" for nic in spec.nics[:1])
        for name, text in (
            ("resolv.conf", resolvers), ("hosts", local + own), ("hostname", f"{spec.name}\n"),
        ):  # fmt: skip
            write_private(f"{place}/{name}", text, 0o644)
        if spec.objects:
            write_private(f"{place}/{oci.CA_FILE}", spec.objects.ca_pem, 0o644)
        text = oci.config(spec, first, root=self.root, place=place, cgroup=f"/ee/{spec.uid}")
        write_private(f"{place}/config.json", text)

    async def resume(self) -> None:
        """Open the log and its FIFO; go on where a checkpoint was cut short."""
        await frozen_container.recover(self)
        if self.log is None:
            self.log = Log(self.places.log)
            self._fifo = Fifo(f"{self.places.run}/output", self.log, self.base_id)

    async def start(self) -> Watched:
        """``crun run --detach``: the container's first process becomes a child of process 1."""
        if self._fifo is None:
            raise Permanent("start before prepare")
        self._write_files(oci.first_process(self.spec, self._user()))
        place, launched_s = self.places.run, time.monotonic()
        output = self._fifo.writer()
        try:
            if frozen_container.is_due(self):
                with not_restored():
                    return await self._restore(output)
            await self._run_crun(stdout=output, stderr=output)
        except Permanent as error:
            raise Permanent(self._complaint() or str(error)) from error
        finally:
            os.close(output)
        with open(f"{place}/pid") as file:
            return Watched(int(file.read()), launched_s)

    async def _restore(self, output: int) -> Watched:
        process = await frozen_container.restore(self, output)
        frozen_container.done(self)
        return process

    async def _run_crun(self, **output: Any) -> None:
        place = self.places.run
        await run(
            *crun.ARGUMENTS, "--log", f"{place}/crun.log", "--log-format", "json", "run",
            "--detach", "--bundle", place, "--pid-file", f"{place}/pid", self.spec.uid,
            timeout_s=START_TIMEOUT_S, **crun.spawning(), **output,
        )  # fmt: skip

    def _complaint(self) -> str:
        """What crun said last in its own log."""
        with (
            contextlib.suppress(FileNotFoundError, IndexError, ValueError, KeyError),
            open(f"{self.places.run}/crun.log", errors="replace") as file,
        ):
            line = file.read()[-8192:].strip().splitlines()[-1]
            return str(json.loads(line)["msg"])[:500]
        return ""

    async def stop(self, process: Watched, grace_s: float) -> None:
        """TERM to the first process, KILL to all that is left after ``grace_s``.

        The first process of a pid namespace is not killed by a signal that it does not handle
        (pid_namespaces(7)): then there is nothing to wait for.
        """
        if handles(process.pid, signal.SIGTERM):
            process.send(signal.SIGTERM)
            if await process.ended_within(grace_s):
                return
        process.send(signal.SIGKILL)

    async def ended(self) -> None:
        """What ``crun delete --force`` does, without the process: cgroup and crun's state go."""
        await cgroups.remove(self.spec.uid)
        await self._services.volumes.release(self.spec.uid, self.places.run)
        remove_tree(f"{paths.CRUN}/{self.spec.uid}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.places.run}/crun.log")

    async def destroy(self) -> None:
        """Everything; also of an EE that an earlier agent made."""
        await self.ended()
        if self._fifo:
            self._fifo.close()
            self._fifo = None
        if self.log:
            self.log.close()
            self.log = None
        networks.Networks.detach(self.spec.uid, len(self.spec.nics))
        rootfs.unmount_root(self.places.run)
        namespaces.remove(f"{self.places.run}/ns")
        await asyncio.to_thread(remove_places, self.places)

    def exec_process(
        self, argv: list[str], env: dict[str, str], workdir: str, user: str, *, terminal: bool
    ) -> str:
        """The OCI process (JSON) for a program run beside the first one, under the same limits."""
        image, own = self.spec.image.process, self.spec.process
        who = users.resolve(user or own.user or image.user, self.root)
        store = oci.store_variables(self.spec)
        lines = oci.environment(image.env, store, own.env, env, home=who.home)
        place = workdir or own.workdir or image.workdir
        return json.dumps(oci.process(argv, lines, place, who, terminal=terminal))


def remove_places(places: Places) -> None:
    """Delete an EE's directories."""
    for path in (places.layer, places.run):
        remove_tree(path)
