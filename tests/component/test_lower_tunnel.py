"""From one user domain to another: who gets in, what passes, and what ends it."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from supercloud.lower.provider import dial
from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.identity import Birth, IdentityStore
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.lower.user_domain.service import Service
from supercloud.lower.user_domain.tunnel import Tunnels
from supercloud.model.errors import (
    Busy,
    Denied,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
)
from supercloud.trust import tls
from supercloud.trust.authority import Authority
from supercloud.trust.names import CONTROL, HOST, Identity, user_server_name
from supercloud.wire.codec import encode
from supercloud.wire.peer import Peer
from supercloud.wire.portal import Reply
from supercloud.wire.tunnel import PeerHost, TunnelApply

USER = "demo"


class Uplink:
    """The provider's driver, without its domain; ``ours`` are the sockets it gave."""

    async def call(self, method: str, asked: dict[str, Any]) -> Reply:
        assert method == "uplink.dial"
        address = dial.check(asked["address"], "any")
        return Reply({}, [dial.begin(address, asked["port"]).detach()])


class Domain:
    """A user's domain of a U-Cloud, with its certificate; what it serves are echoes."""

    def __init__(self, directory: Path, authority: Authority, name: str, port: int = 0) -> None:
        home = directory / name
        home.mkdir()
        self.name, self.port = name, port
        self.identity = IdentityStore(str(home), Birth(USER, authority.root_pem), name)
        self.identity.admit(Identity(authority.ucloud, CONTROL, CONTROL))
        own = Identity(authority.ucloud, HOST, name)
        self.identity.install(authority.issue(self.identity.request(), own))
        uplink = cast("Channel", Uplink())
        self.tunnels = Tunnels(uplink, self.identity, str(home / "tunnel"))
        self.tunnels.object_client = self._client
        self.tunnels.replica = self._replica
        self.clients: list[tuple[str, socket.socket]] = []
        self.asked: list[tuple[str, str, int]] = []
        facts = {"instance": name}
        platforms = cast("Platforms", SimpleNamespace())
        self.service = Service(facts, self.identity, platforms, self.tunnels, {}, Feed(USER, name))

    def _client(self, who: str, sock: socket.socket) -> None:
        self.clients.append((who, sock))
        sock.setblocking(False)

    async def _replica(self, host: str, volume: str, generation: int) -> socket.socket:
        self.asked.append((host, volume, generation))
        if volume == "secret":
            raise Denied("not for you")
        ours, theirs = socket.socketpair()
        self._client(host, theirs)
        return ours

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[PeerHost]:
        """As the front door: sockets are passed on untouched."""
        with socket.create_server(("127.0.0.1", self.port)) as listener:
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            accepting = asyncio.ensure_future(self._accept(listener))
            try:
                yield self.peer
            finally:
                accepting.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            self.service.connection("connection", {}, [sock.detach()])

    @property
    def peer(self) -> PeerHost:
        return PeerHost(name=self.name, user=USER, address="127.0.0.1", port=self.port)


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
def authority(trust: str) -> Authority:
    return Authority.ensure(trust, "mine")


@pytest.fixture
def here(tmp_path: Path, authority: Authority) -> Domain:
    return Domain(tmp_path, authority, "here")


@pytest.fixture
def there(tmp_path: Path, authority: Authority) -> Domain:
    return Domain(tmp_path, authority, "there")


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


async def exactly(sock: socket.socket, count: int) -> bytes:
    got = b""
    async with asyncio.timeout(30):
        while len(got) < count:
            more = await asyncio.get_running_loop().sock_recv(sock, count - len(got))
            assert more, "it ended"
            got += more
    return got


async def ends(sock: socket.socket) -> bool:
    async with asyncio.timeout(30):
        return not await asyncio.get_running_loop().sock_recv(sock, 1)


async def client_at(domain: Domain) -> tuple[str, socket.socket]:
    async with asyncio.timeout(30):
        while not domain.clients:
            await asyncio.sleep(0.01)
    return domain.clients.pop()


async def joined(here: Domain, there: Domain, peer: PeerHost) -> Any:
    """A client of the store here, and the same one as the other host sees it."""
    there.tunnels.apply(TunnelApply(objects_to=["here"]))
    here.tunnels.apply(TunnelApply(objects_from=peer))
    ours, theirs = pair()
    here.tunnels.object_client_elsewhere("plat", theirs)
    return ours, (await client_at(there))[1]


async def test_a_client_here_reaches_the_store_there_both_ways(here: Domain, there: Domain) -> None:
    loop = asyncio.get_running_loop()
    async with there.listening() as peer:
        ours, far = await joined(here, there, peer)
        data = os.urandom(3 << 20)
        sending = asyncio.ensure_future(loop.sock_sendall(ours, data))
        assert await exactly(far, len(data)) == data
        await sending
        await loop.sock_sendall(far, b"answer")
        assert await exactly(ours, 6) == b"answer"


async def test_who_does_not_read_stops_who_writes(here: Domain, there: Domain) -> None:
    loop = asyncio.get_running_loop()
    async with there.listening() as peer:
        ours, far = await joined(here, there, peer)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await loop.sock_sendall(ours, bytes(1 << 20))
                sent += 1

        sending = asyncio.ensure_future(send())
        looks = [0]
        async with asyncio.timeout(60):
            while not sent or looks[-3:] != [sent] * 3:
                await asyncio.sleep(0.5)
                looks.append(sent)
        assert sent < 64
        sending.cancel()
        assert len(await exactly(far, 1 << 20)) == 1 << 20


@pytest.mark.parametrize("who", ["client", "store"])
async def test_either_end_ends_both(here: Domain, there: Domain, who: str) -> None:
    async with there.listening() as peer:
        ours, far = await joined(here, there, peer)
        ended, other = (ours, far) if who == "client" else (far, ours)
        ended.close()
        assert await ends(other)


async def test_a_host_that_was_not_named_is_refused(here: Domain, there: Domain) -> None:
    async with there.listening() as peer:
        there.tunnels.apply(TunnelApply(objects_to=["another"]))
        here.tunnels.apply(TunnelApply(objects_from=peer))
        ours, theirs = pair()
        here.tunnels.object_client_elsewhere("plat", theirs)
        assert await ends(ours)
        assert not there.clients


async def test_what_was_allowed_ends_when_it_is_not_any_more(here: Domain, there: Domain) -> None:
    async with there.listening() as peer:
        ours, _ = await joined(here, there, peer)
        there.tunnels.apply(TunnelApply())
        assert await ends(ours)


async def test_what_was_told_outlives_the_domain(
    here: Domain, tmp_path: Path, there: Domain
) -> None:
    async with there.listening() as peer:
        here.tunnels.apply(TunnelApply(objects_from=peer))
        again = Tunnels(cast("Channel", Uplink()), here.identity, str(tmp_path / "here" / "tunnel"))
        there.tunnels.apply(TunnelApply(objects_to=["here"]))
        _ours, theirs = pair()
        again.object_client_elsewhere("plat", theirs)
        assert (await client_at(there))[0] == "host here"


async def test_a_replica_is_asked_for_by_who_one_is(here: Domain, there: Domain) -> None:
    async with there.listening() as peer:
        ours = await here.tunnels.reach_replica(peer, "data", 7)
        ours.setblocking(False)
        assert there.asked == [("here", "data", 7)]
        _, far = await client_at(there)
        await asyncio.get_running_loop().sock_sendall(far, b"NBDMAGIC")
        assert await exactly(ours, 8) == b"NBDMAGIC"
        with pytest.raises(Denied, match="not for you"):
            await here.tunnels.reach_replica(peer, "secret", 7)


async def test_so_many_get_in_however_many_come_at_once(
    here: Domain, there: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supercloud.lower.user_domain.tunnel.MAX_TUNNELS", 2)
    everybody, look_up = asyncio.Barrier(2), there.tunnels.replica

    async def slow(host: str, volume: str, generation: int) -> socket.socket:
        await everybody.wait()  # as long as nobody has got in yet
        return await look_up(host, volume, generation)

    there.tunnels.replica = slow
    async with there.listening() as peer:
        asking = [here.tunnels.reach_replica(peer, "data", 1) for _ in range(5)]
        async with asyncio.timeout(30):
            found = await asyncio.gather(*asking, return_exceptions=True)
        inside = [sock for sock in found if isinstance(sock, socket.socket)]
        assert len(inside) == 2
        assert sum(isinstance(one, Busy) for one in found) == 3
        for sock in inside:
            sock.close()
        for _, far in there.clients:
            assert await ends(far)
        there.tunnels.replica = look_up
        await here.tunnels.reach_replica(peer, "data", 1)  # there is room again


async def test_so_many_replicas_are_reached_beside_all_clients_of_a_store(
    here: Domain, there: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supercloud.lower.user_domain.tunnel.MAX_REPLICAS", 2)
    async with there.listening() as peer:
        for _ in range(3):
            with pytest.raises(Denied, match="not for you"):  # it takes nobody's place
                await here.tunnels.reach_replica(peer, "secret", 1)
        inside = [await here.tunnels.reach_replica(peer, "data", 1) for _ in range(2)]
        with pytest.raises(NoResources, match="volume data is not reached at there: 2") as refused:
            await here.tunnels.reach_replica(peer, "data", 1)
        assert "replicas" in refused.value.hint
        assert len(there.asked) == 5, "it was not even dialled"
        there.clients.clear()
        await joined(here, there, peer)  # those are counted by themselves
        inside.pop().close()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(NoResources):
                    inside.append(await here.tunnels.reach_replica(peer, "data", 1))
                    break
                await asyncio.sleep(0.01)


async def test_who_is_refused_takes_nobodys_place(
    here: Domain, there: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supercloud.lower.user_domain.tunnel.MAX_TUNNELS", 1)
    async with there.listening() as peer:
        for _ in range(3):
            with pytest.raises(Denied, match="not for you"):
                await here.tunnels.reach_replica(peer, "secret", 1)
        await here.tunnels.reach_replica(peer, "data", 1)


async def test_another_host_than_the_one_meant_gets_nothing(here: Domain, there: Domain) -> None:
    async with there.listening() as peer:
        wrong = PeerHost(name="third", user=USER, address=peer.address, port=peer.port)
        with pytest.raises(Denied, match="third"):
            await here.tunnels.reach_replica(wrong, "data", 1)
        assert not there.asked


async def test_a_host_of_another_ucloud_of_the_same_user_is_refused(
    there: Domain, tmp_path: Path, trust: str, authority: Authority
) -> None:
    other = Authority.ensure(trust, "other")
    assert other.root_pem == authority.root_pem
    stranger = Domain(tmp_path, other, "stranger")
    async with there.listening() as peer:
        with pytest.raises(SupercloudError):
            await stranger.tunnels.reach_replica(peer, "data", 1)
        assert not there.asked


async def test_a_host_may_call_nothing_of_the_control_planes(here: Domain, there: Domain) -> None:
    async with there.listening() as peer:
        reader, writer = await asyncio.open_connection(
            peer.address, peer.port, ssl=here.identity.client_context(),
            server_hostname=user_server_name(USER),
        )  # fmt: skip
        assert tls.peer_identity(writer.get_extra_info("ssl_object")) is not None
        wire = Peer(reader, writer, accepted=False)
        running = asyncio.ensure_future(wire.run())
        for method in ("host.info", "platform.list", "volume.list", "tunnel.apply"):
            with pytest.raises(NotFound):
                await wire.call(method, encode(TunnelApply()))
        wire.close()
        await asyncio.gather(running, return_exceptions=True)


async def test_nobody_there_is_said_in_time(here: Domain, there: Domain) -> None:
    async with there.listening() as peer:
        pass
    with pytest.raises(Temporary, match="there"):
        await here.tunnels.reach_replica(peer, "data", 1)


async def test_a_front_door_that_says_nothing_is_given_up(
    here: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supercloud.lower.user_domain.tunnel.CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        peer = PeerHost(name="there", user=USER, address="127.0.0.1", port=port)
        with pytest.raises(Temporary, match="did not answer"):
            await here.tunnels.reach_replica(peer, "data", 1)
