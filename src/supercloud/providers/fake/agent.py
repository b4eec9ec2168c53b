"""A pretended platform's agent: the real protocol over the real TLS, with nothing behind it."""

import asyncio
import base64
import contextlib
import logging
import os
import ssl
from asyncio import StreamReader, StreamWriter
from dataclasses import replace
from typing import Any

from supercloud.model.errors import BadState, NotFound, SupercloudError
from supercloud.model.events import Event
from supercloud.providers.fake import identity
from supercloud.providers.fake.cloud import FakeCloud, Platform
from supercloud.trust import tls
from supercloud.wire.checkpoints import CheckpointSnapshot, CheckpointTake, CheckpointTaken
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import (
    CONTROL_TO_AGENT,
    PROTOCOL,
    Apply,
    ByName,
    Certificate,
    Empty,
    Enroll,
    EnvironmentSpec,
    EnvironmentStatus,
    Exec,
    Hello,
    Implementation,
    Logs,
    PlatformReport,
    VolumeUsage,
    handlers,
)
from supercloud.wire.peer import Call, Peer

ALPN = "supercloud-agent/1"
GIB = 1 << 30

log = logging.getLogger("supercloud.providers.fake.agent")


class FakeAgent:
    """One platform's agent. ``connect`` is one connection of it; its state is the platform's."""

    def __init__(self, cloud: FakeCloud, platform: Platform) -> None:
        self.cloud, self.platform = cloud, platform
        self._peer: Peer | None = None
        self._settling: asyncio.Task[None] | None = None
        calls: dict[str, Implementation] = {
            "ee.apply": self._apply, "ee.list": self._list, "ee.exec": self._exec,
            "ee.logs": self._logs, "ee.console": self._console, "ee.restart": self._restart,
            "platform.shutdown": self._shutdown, "ee.checkpoint": self._checkpoint,
        }  # fmt: skip
        self._handlers = handlers(CONTROL_TO_AGENT, calls)

    async def connect(self, sock: Any) -> None:
        """Speak over a connected socket, which it takes: enrol if need be, else serve."""
        if self.platform.boot is None:
            raise BadState(f"{self.platform.name} has no boot data")
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=self._context(), server_hostname=self.platform.boot.server_name
        )
        peer = Peer(reader, writer, self._handlers, accepted=False, name=self.platform.name)
        running = asyncio.ensure_future(peer.run())
        try:
            if self.enrolled():
                await self._serve(peer, running)
            else:
                await self._enroll(peer)
        finally:
            peer.close()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    # -- identity

    def _certificate_path(self) -> str:
        return self.cloud.path(self.platform.name, ".pem")

    def enrolled(self) -> bool:
        """Whether it has its certificate."""
        return os.path.exists(self._certificate_path())

    def _context(self) -> ssl.SSLContext:
        boot = self.platform.boot
        paths = ("", "")
        if self.enrolled():
            paths = self._certificate_path(), self.cloud.path(self.platform.name, ".key")
        return tls.client_context(boot.ca_pem if boot else "", *paths, alpn=ALPN)

    async def _enroll(self, peer: Peer) -> None:
        boot = self.platform.boot
        assert boot is not None  # noqa: S101 - connect has checked
        csr = identity.request(self.cloud.path(self.platform.name, ".key"), boot.platform)
        asked = Enroll(ucloud=boot.ucloud, platform=boot.platform, token=boot.token, csr_pem=csr)
        answer = await peer.call("agent.enroll", encode(asked))
        got = decode(Certificate, answer, "agent.enroll", ignore_unknown=True)
        if self.cloud.platforms.get(self.platform.name) is self.platform:
            identity.keep(self._certificate_path(), got.cert_pem + got.chain_pem)

    # -- serving

    async def _serve(self, peer: Peer, running: "asyncio.Future[None]") -> None:
        peer.context["enrolled"] = True  # its certificate was checked by TLS
        hello = Hello(
            ucloud=self.platform.boot.ucloud if self.platform.boot else "",
            platform=self.platform.name,
            protocol=PROTOCOL,
            version="fake",
            boot_id=self.platform.boot_id,
            engines={
                "crun": "pretended",
                "qemu": "pretended",
                "checkpoint:container": "",
                "checkpoint:vm": "" if self.cloud.options.vm_checkpoints else "its options say so",
            },
            accelerator="tcg",
            memory_bytes=self.platform.memory_bytes,
            cpus=self.platform.cpus,
        )
        await peer.call("agent.hello", encode(hello))
        self._peer = peer
        try:
            self._report()
            await asyncio.shield(running)
        finally:
            if self._peer is peer:
                self._peer = None

    def report(self) -> PlatformReport:
        """What is on the platform now."""
        platform = self.platform
        return PlatformReport(generation=platform.generation, environments=list(platform.statuses))

    def _report(self) -> None:
        if self._peer is not None:
            self._peer.notify("agent.report", encode(self.report()))

    def _event(self, name: str, code: str) -> None:
        if self._peer is not None and self.platform.boot is not None:
            event = Event(
                ucloud=self.platform.boot.ucloud, subject=f"environment/{name}",
                actor=f"platform/{self.platform.name}", code=code,
            )  # fmt: skip
            self._peer.notify("agent.event", encode(event))

    # -- environments

    async def _apply(self, _call: Call, apply: Apply) -> PlatformReport:
        platform = self.platform
        if apply.generation < platform.generation:
            return self.report()  # late: a newer one came already
        there = {status.uid: status for status in platform.statuses}
        platform.generation, platform.specs = apply.generation, list(apply.environments)
        platform.statuses = [there.get(s.uid) or self._begun(s) for s in apply.environments]
        uids = {status.uid for status in platform.statuses}
        platform.words = {uid: words for uid, words in platform.words.items() if uid in uids}
        self.cloud.save(platform)
        if self._settling is None or self._settling.done():
            self._settling = asyncio.ensure_future(self._settle())
        return self.report()

    def _begun(self, spec: EnvironmentSpec) -> EnvironmentStatus:
        """From its image, or from a checkpoint; one that is refused is said to be."""
        status, words = _status(spec), []
        if spec.restore is not None:
            try:
                content = self.cloud.checkpoints.read(self.platform.host, spec.restore)
            except SupercloudError as error:
                return replace(status, state="failed", reason=str(error))
            words = list(content["words"])
        self.platform.words[spec.uid] = words
        return status

    def resume(self) -> None:
        """Go on with what was applied before the process ended."""
        if self._settling is None and any(s.state == "starting" for s in self.platform.statuses):
            self._settling = asyncio.ensure_future(self._settle())

    async def stop(self) -> None:
        """End what goes on inside; the platform's state stays."""
        if self._settling is not None:
            self._settling.cancel()
            await asyncio.gather(self._settling, return_exceptions=True)

    async def _settle(self) -> None:
        """Take everything that starts to where it belongs, one state for all at a time."""
        while self._next() != self.platform.statuses:
            await asyncio.sleep(self.cloud.options.start_ms / 2000)
            self.platform.statuses = self._next()
            self.cloud.save(self.platform)
            self._report()
        for status in self.platform.statuses:
            self._event(status.name, f"environment.{status.kind}.{status.state}")

    def _next(self) -> list[EnvironmentStatus]:
        specs = {spec.uid: spec for spec in self.platform.specs}
        return [_advance(status, specs[status.uid]) for status in self.platform.statuses]

    def _find(self, name: str) -> EnvironmentStatus:
        for status in self.platform.statuses:
            if status.name == name:
                return status
        raise NotFound(f"no environment {name} on platform {self.platform.name}")

    async def _list(self, _call: Call, _params: Empty) -> PlatformReport:
        return self.report()

    async def _checkpoint(self, call: Call, asked: CheckpointTake) -> CheckpointTaken:
        async def snapshot() -> None:
            wanted = CheckpointSnapshot(name=asked.name, uid=asked.uid, snapshot=asked.snapshot)
            await call.peer.call("checkpoint.snapshot", encode(wanted))

        return await self.cloud.checkpoints.take_environment(self.platform, asked, snapshot)

    async def _restart(self, _call: Call, asked: ByName) -> Empty:
        old = self._find(asked.name)
        new = replace(old, state="starting", restarts=old.restarts + 1, exit_status=None)
        self.platform.statuses = [new if s is old else s for s in self.platform.statuses]
        self.cloud.save(self.platform)
        if self._settling is None or self._settling.done():
            self._settling = asyncio.ensure_future(self._settle())
        return Empty()

    async def _exec(self, call: Call, asked: Exec) -> dict[str, int]:
        """``echo`` prints, ``exit N`` ends so, ``stderr`` complains, all else echoes its input."""
        if self._find(asked.name).state not in ("running", "serving", "unready"):
            raise BadState(f"environment {asked.name} does not run")
        stream = call.accept(encode(Empty()))
        program, *arguments = asked.argv
        if program == "echo":
            await stream.write(" ".join(arguments).encode() + b"\n")
        elif program == "stderr":
            stream.signal(stderr=base64.b64encode(" ".join(arguments).encode()).decode())
        elif program == "exit":
            return {"exit_status": int(arguments[0])}
        else:
            while (item := await stream.read()) is not None:
                if isinstance(item, bytes):
                    await stream.write(item)
                elif "eof" in item:
                    break
        return {"exit_status": 0}

    async def _logs(self, call: Call, asked: Logs) -> None:
        status = self._find(asked.name)
        stream = call.accept(encode(Empty()))
        lines = [f"{status.name}: {line}" for line in ("starting", "listening", status.state)]
        shown = lines if asked.tail < 0 else lines[len(lines) - min(asked.tail, len(lines)) :]
        await stream.write("".join(line + "\n" for line in shown).encode())
        if asked.follow:
            while await stream.read() is not None:
                pass

    async def _console(self, call: Call, asked: ByName) -> None:
        status = self._find(asked.name)
        if status.kind != "vm":
            raise BadState(f"environment {asked.name} is a container and has no console")
        stream = call.accept(encode(Empty()))
        await stream.write(f"{asked.name} login: ".encode())
        with contextlib.suppress(SupercloudError):
            async for data in stream.chunks():
                await stream.write(data)

    async def _shutdown(self, _call: Call, _params: Empty) -> Empty:
        self.platform.statuses = [replace(s, state="exited") for s in self.platform.statuses]
        self.cloud.set_state(self.platform.name, "stopping")
        self.cloud.set_state(self.platform.name, "stopped", "was shut down")
        return Empty()


def _status(spec: EnvironmentSpec) -> EnvironmentStatus:
    engine = "crun" if spec.kind == "container" else "qemu/tcg"
    return EnvironmentStatus(
        name=spec.name, uid=spec.uid, kind=spec.kind, state="starting", engine=engine
    )


def _usage(volume: str) -> VolumeUsage:
    return VolumeUsage(volume=volume, size_bytes=1 << 24, used_bytes=1 << 16)


def _advance(status: EnvironmentStatus, spec: EnvironmentSpec) -> EnvironmentStatus:
    """The next state on the way: ``false`` and ``true`` end, what never restarts stays ended."""
    missing = [mount.volume for mount in spec.volumes if not mount.slot]
    if status.state == "starting" and missing:
        return replace(status, reason=f"waits for volume {', '.join(missing)}")
    if status.state == "starting":
        usage = [_usage(mount.volume) for mount in spec.volumes if spec.kind == "container"]
        status = replace(status, reason="", volumes=usage)
        return replace(status, state="running", pid=1, memory_bytes=spec.memory_bytes // 4)
    program = (spec.process.argv or [""])[0]
    if status.state == "running" and spec.restart == "never" and program in ("true", "false"):
        return replace(status, state="exited", pid=0, exit_status=int(program == "false"))
    return replace(status, state="serving") if status.state == "running" else status


async def dial(agent: FakeAgent, sock: Any) -> None:
    """One connection of the agent; why it ended is logged, for the agent dials again anyway."""
    try:
        await agent.connect(sock)
    except (SupercloudError, OSError, EOFError) as error:
        log.debug("%s: %s", agent.platform.name, error)


async def raw_streams(sock: Any) -> tuple[StreamReader, StreamWriter]:
    """The control plane's end of an agent's connection, as a provider relays it."""
    return await asyncio.open_connection(sock=sock)
