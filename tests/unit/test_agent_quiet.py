"""The agent's end of a checkpoint of its platform, over a socket in place of the port."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from supercloud.upper.platform.agent import cgroups, identity, quiet
from supercloud.upper.platform.agent.quiet import Quiet

NONCE = "0123456789abcdef"


class Platform:
    """What is done to it, in order; ``frozen`` is whether its EEs stand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.frozen, self.obeys = False, True
        ours, self.host = socket.socketpair()
        self.host.setblocking(False)
        monkeypatch.setattr(cgroups, "freeze_all", self._freeze)
        monkeypatch.setattr(cgroups, "all_are_frozen", lambda: self.frozen)
        monkeypatch.setattr(os, "sync", lambda: self.done.append("sync"))
        monkeypatch.setattr(identity, "reseed", lambda seed: self.done.append(f"seed {len(seed)}"))
        monkeypatch.setattr(identity, "set_macs", lambda macs: self.done.append(f"macs {macs}"))
        monkeypatch.setattr(time, "clock_settime", lambda _, now: self.done.append(f"time {now}"))
        monkeypatch.setattr(quiet, "run", self._run)
        self.quiet = Quiet(self._settled, lambda: self.done.append("restored"), ours.detach())

    def _freeze(self, on: bool) -> None:
        self.done.append("freeze" if on else "thaw")
        self.frozen = on and self.obeys

    async def _run(self, *argv: str) -> bytes:
        self.done.append(" ".join(argv))
        return b""

    async def _settled(self) -> None:
        self.done.append("settled")

    async def ask(self, do: str, **more: Any) -> None:
        line = json.dumps({"version": 1, "do": do, "nonce": NONCE, **more})
        await asyncio.get_running_loop().sock_sendall(self.host, f"{line}\n".encode())

    async def says(self) -> str:
        async with asyncio.timeout(60):
            return (await asyncio.get_running_loop().sock_recv(self.host, 200)).decode()

    async def until(self, what: str) -> None:
        async with asyncio.timeout(60):
            while what not in self.done:
                await asyncio.sleep(0.01)


@pytest.fixture
async def platform(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Platform]:
    made = Platform(monkeypatch)
    running = asyncio.ensure_future(made.quiet.run())
    await asyncio.sleep(0)
    made.done.clear()  # it thaws when it starts
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    asyncio.get_running_loop().remove_reader(made.quiet._port)
    os.close(made.quiet._port)
    made.host.close()


async def test_it_says_paused_when_everything_stands_and_lets_go_when_told(
    platform: Platform,
) -> None:
    await platform.ask("pause")
    assert await platform.says() == f"paused {NONCE}\n"
    assert platform.done == ["settled", "sync", "freeze"]
    await platform.ask("resume")
    await platform.until("thaw")
    assert not platform.frozen


async def test_what_does_not_come_to_a_stand_is_refused_and_let_go(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "FREEZE_S", 0.05)
    platform.obeys = False
    await platform.ask("pause")
    assert await platform.says() == f"refused {NONCE}\n"
    assert platform.done[-1] == "thaw"


async def test_a_platform_that_was_restored_is_another_before_anything_in_it_runs(
    platform: Platform,
) -> None:
    await platform.ask("pause")
    await platform.says()
    platform.done.clear()
    macs = ["02:5c:00:00:00:01", "02:5c:77:00:00:01"]
    await platform.ask("resume", seed="ab" * 64, time_s=5.5, macs=macs)
    assert await platform.says() == f"ready {NONCE}\n"
    await platform.until("restored")
    assert platform.done == [
        "seed 64", "time 5.5", f"macs {macs}", "thaw", "ip neigh flush all", "restored",
    ]  # fmt: skip


async def test_a_host_that_forgets_it_does_not_stop_it_for_ever_nor_the_next_pause(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "LONGEST_S", 0.3)
    await platform.ask("pause")
    await platform.says()
    await platform.ask("resume")
    await platform.until("thaw")
    monkeypatch.setattr(quiet, "LONGEST_S", 60.0)
    await platform.ask("pause")
    await platform.says()
    await asyncio.sleep(0.5)
    assert platform.frozen, "the first pause's time is not the second one's"
    monkeypatch.setattr(quiet, "LONGEST_S", 0.3)
    platform.done.clear()
    await platform.ask("pause")
    assert await platform.says() == f"paused {NONCE}\n"
    await platform.until("thaw")


async def test_a_pause_after_one_that_was_forgotten_has_all_its_time(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "LONGEST_S", 0.5)
    await platform.ask("pause")
    await platform.says()
    monkeypatch.setattr(quiet, "LONGEST_S", 60.0)
    await platform.ask("pause")
    await platform.says()
    platform.done.clear()
    await asyncio.sleep(0.7)
    assert platform.done == []
    assert platform.frozen


@pytest.mark.parametrize(
    "nonsense",
    [b"\n", b"{}\n", b"[[[[\n", b"\xff\xfe\n", b'{"version": 2, "do": "pause"}\n', b"x" * 9000 + b"\n",
     json.dumps({"version": 1, "do": "pause", "nonce": "../../x"}).encode() + b"\n",
     json.dumps({"version": 1, "do": "run", "nonce": NONCE}).encode() + b"\n"],
)  # fmt: skip
async def test_nonsense_at_the_port_does_nothing(platform: Platform, nonsense: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(platform.host, nonsense)
    await asyncio.sleep(0.05)
    assert platform.done == []
    await platform.ask("pause")
    assert await platform.says() == f"paused {NONCE}\n"
