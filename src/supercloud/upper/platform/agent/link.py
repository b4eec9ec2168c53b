"""The way to the control plane: enrolled once, connected for ever, over any of the endpoints."""

import asyncio
import contextlib
import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from supercloud.model.errors import SupercloudError, Temporary, UserError
from supercloud.trust import keys, libcrypto, tls
from supercloud.trust.names import PLATFORM, Identity
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.bootdata import BootData
from supercloud.upper.platform.agent.fetch import Source
from supercloud.upper.platform.agent.processes import run
from supercloud.upper.platform.agent.state import write_private
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import (
    PROTOCOL,
    Blob,
    Certificate,
    CsrResult,
    Deposited,
    Enroll,
    Hello,
    Welcome,
)
from supercloud.wire.peer import Handler, Peer

ALPN = "supercloud-agent/1"
CONNECT_TIMEOUT_S = 10.0
READ_BYTES = 1 << 20
BACK_OFF_S = (0.1, 15.0)
CLOCK_TOLERANCE_S = 0.1
DEPOSIT_TIMEOUT_S = 60.0
RENEW_RETRY_S = (60.0, 600.0)

log = logging.getLogger("supercloud.agent.link")


class Link:
    """``hello`` makes the greeting; ``up`` is called on every new connection, ready to use."""

    def __init__(
        self, boot: BootData, hello: Callable[[], Any], handlers: Mapping[str, Handler],
        up: Callable[[], None],
    ) -> None:  # fmt: skip
        self._boot, self._hello, self.handlers, self._up = boot, hello, handlers, up
        self._peer: Peer | None = None
        self._dialled: Peer | None = None  # the same, and before it has welcomed us
        self._request: asyncio.Task[str] | None = None
        self._turn = 0
        self._again = asyncio.Event()  # the wait before the next connection is over
        self._context: ssl.SSLContext | None = None  # of the present connection
        self._without: ssl.SSLContext | None = None  # of the enrolment before it
        self.requested = asyncio.Event()  # our key is made: the rest may have the processor
        self.welcomed = asyncio.Event()  # we have been connected

    def peer(self) -> Peer:
        """The present connection; Temporary when there is none."""
        if self._peer is None or self._peer.closed.is_set():
            raise Temporary("not connected to the control plane")
        return self._peer

    def dial_again(self) -> None:
        """The present connection leads to nobody, and what failed before it counts no more."""
        self._again.set()
        if self._dialled is not None:
            self._dialled.writer.transport.abort()

    def source(self) -> Source:
        """Where files are to be had; Temporary while we are not connected."""
        self.peer()
        if self._context is None:
            raise Temporary("not connected to the control plane")
        host, port = self._endpoint()
        return Source(host, port, self._boot.server_name, self._context)

    async def deposit(self, blob: Blob) -> Deposited:
        """Have the platform's host lay a file down on its disk."""
        answer = await self.peer().call("blob.deposit", encode(blob), timeout_s=DEPOSIT_TIMEOUT_S)
        return decode(Deposited, answer, "blob.deposit", ignore_unknown=True)

    def _endpoint(self) -> tuple[str, int]:
        endpoint = self._boot.endpoints[self._turn % len(self._boot.endpoints)]
        host, _, port = endpoint.rpartition(":")
        return host.strip("[]"), int(port)

    def notify(self, method: str, params: Any) -> None:
        """Tell the control plane, if it is there; it asks for the rest when it comes back."""
        if self._peer is not None and not self._peer.closed.is_set():
            self._peer.notify(method, encode(params))

    def make_key(self) -> None:
        """Begin making key and request: it takes a while, and needs no connection."""
        if os.path.exists(paths.CERTIFICATE):
            self.requested.set()
        else:
            self._request = asyncio.ensure_future(asyncio.to_thread(self._make_request))
            self._request.add_done_callback(lambda _: self.requested.set())

    def _make_request(self) -> str:
        os.makedirs(os.path.dirname(paths.KEY), mode=0o700, exist_ok=True)
        identity = Identity(self._boot.ucloud, PLATFORM, self._boot.platform)
        if not os.path.exists(paths.KEY) and libcrypto.is_there():
            key, request = libcrypto.make_key_and_request(identity.uri)
            keys.keep_key(paths.KEY, key)
            return request
        keys.ensure_key(paths.KEY)
        return keys.make_request(paths.KEY, identity.uri, identity.dns)

    async def run(self) -> None:
        """Keep connected; never returns.

        A platform whose certificate ended while nobody was there to renew it enrols again: its
        token goes on being good for its own key.
        """
        delay_s, failed = BACK_OFF_S[0], False
        while True:
            began_s = time.monotonic()
            try:
                if not os.path.exists(paths.CERTIFICATE) or (failed and await has_ended()):
                    await self._enroll()
                await self._serve()
                failed = False
            except (SupercloudError, OSError, ssl.SSLError, TimeoutError, EOFError) as error:
                message = error.message if isinstance(error, UserError) else str(error)
                log.warning("link: %s: %s", type(error).__name__, message)
                self._turn += 1
                failed = True
            self._peer = None
            steady = time.monotonic() - began_s > BACK_OFF_S[1]
            delay_s = BACK_OFF_S[0] if steady else min(delay_s * 1.7, BACK_OFF_S[1])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s * (0.5 + os.urandom(1)[0] / 512)):  # jitter
                    await self._again.wait()
                    delay_s = BACK_OFF_S[0]
            self._again.clear()

    async def _connect(self, context: ssl.SSLContext, handlers: Mapping[str, Handler]) -> Peer:
        host, port = self._endpoint()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(
                host, port, ssl=context, limit=READ_BYTES,
                # as bytes, which need no IDNA codec with its tables: 50 ms of the start
                server_hostname=self._boot.server_name.encode(),
            )  # fmt: skip
        name = f"control plane at {host}:{port}"
        self._dialled = Peer(reader, writer, handlers, accepted=False, name=name)
        return self._dialled

    async def _enroll(self) -> None:
        """The one-time token for a certificate over the key that never leaves the platform."""
        if self._request is None or (self._request.done() and self._request.exception()):
            self._request = asyncio.ensure_future(asyncio.to_thread(self._make_request))
        request = await self._request
        self._without = tls.client_context(self._boot.ca_pem, alpn=ALPN)
        peer = await self._connect(self._without, {})
        running = asyncio.ensure_future(peer.run())
        try:
            wanted = Enroll(ucloud=self._boot.ucloud, platform=self._boot.platform,
                            token=self._boot.token, csr_pem=request)  # fmt: skip
            answer = await peer.call("agent.enroll", encode(wanted))
            given = decode(Certificate, answer, "agent.enroll", ignore_unknown=True)
        finally:
            peer.close()
            await running
        self._keep(given)
        log.info("enrolled as %s of %s", self._boot.platform, self._boot.ucloud)

    async def _serve(self) -> None:
        context, self._without = self._without, None
        if context is None:
            context = tls.client_context(self._boot.ca_pem, alpn=ALPN)
        context.load_cert_chain(paths.CERTIFICATE, paths.KEY)
        self._context = context
        peer = await self._connect(context, self.handlers)
        peer.context["enrolled"] = True  # TLS has shown that it is our control plane
        running = asyncio.ensure_future(peer.run())
        try:
            answer = await peer.call("agent.hello", encode(self._hello()))
            _set_clock(decode(Welcome, answer, "agent.hello", ignore_unknown=True))
            self._peer = peer
            self.welcomed.set()
            log.info("connected to the %s", peer.name)
            self._up()
            renewing = asyncio.ensure_future(self._renew(peer))
            try:
                await running
            finally:
                renewing.cancel()
        finally:
            peer.close()
            if not running.done():
                await running

    async def _renew(self, peer: Peer) -> None:
        """A new certificate over the same key, at half of the old one's life; used from then on."""
        await asyncio.sleep(RENEW_RETRY_S[0])  # there is more urgent work at first
        while True:
            half_s = await half_life_s(paths.CERTIFICATE) - time.time()
            await asyncio.sleep(max(half_s, RENEW_RETRY_S[0]))
            if half_s > 0:
                continue  # the clock may have been set meanwhile
            try:
                request = await asyncio.to_thread(self._make_request)
                answer = await peer.call("agent.renew", encode(CsrResult(csr_pem=request)))
                self._keep(decode(Certificate, answer, "agent.renew", ignore_unknown=True))
                log.info("certificate renewed")
            except SupercloudError as error:
                log.warning("certificate not renewed: %s", error)
                await asyncio.sleep(RENEW_RETRY_S[1])

    def _keep(self, given: Certificate) -> None:
        text = f"{given.cert_pem.strip()}\n{given.chain_pem.strip()}\n"
        write_private(paths.CERTIFICATE, text)


async def half_life_s(path: str) -> float:
    """When half of the life of the first certificate in ``path`` is over, since the epoch."""
    start, end = await _life_s(path)
    return (start + end) / 2


async def has_ended() -> bool:
    """Whether our certificate's life is over."""
    return (await _life_s(paths.CERTIFICATE))[1] <= time.time()


async def _life_s(path: str) -> tuple[float, float]:
    out = await run("openssl", "x509", "-noout", "-dates", "-in", path)
    dates = dict(line.partition("=")[::2] for line in out.decode().splitlines())
    start, end = (ssl.cert_time_to_seconds(dates[name]) for name in ("notBefore", "notAfter"))
    return float(start), float(end)


def _set_clock(welcome: Welcome) -> None:
    """A platform has nobody else to ask for the time."""
    if welcome.protocol < PROTOCOL - 1:
        raise Temporary(f"the control plane speaks protocol {welcome.protocol}", delay_s=30)
    if abs(welcome.time_s - time.time()) > CLOCK_TOLERANCE_S:
        time.clock_settime(time.CLOCK_REALTIME, welcome.time_s)


def hello(boot: BootData, engines: dict[str, str], accelerator: str, memory_bytes: int) -> Hello:
    """What this platform says of itself."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    return Hello(
        ucloud=boot.ucloud, platform=boot.platform, protocol=PROTOCOL, version="0.1.0",
        boot_id=boot_id, engines=engines, accelerator=accelerator, memory_bytes=memory_bytes,
        cpus=os.cpu_count() or 1,
    )  # fmt: skip
