"""Checkpoints: what platforms say of them, and what is decided at the same time; fake provider."""

import asyncio
import time
from dataclasses import replace

import pytest

from supercloud.control.controllers.checkpoint import _noted as noted
from supercloud.upper.platform.link.session import AgentSession
from support.checkpointed import document, down, take, up
from support.control import World, environment


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def test_a_platform_whose_clock_is_slow_is_not_asked_again_at_once(world, monkeypatch):
    """Nor one that lies: the schedule follows the control plane's time."""
    wish = environment("web", checkpoint={"every": "1h"})
    await up(world, [wish])
    taken = AgentSession.checkpoint

    async def slow(session, asked, **more):
        return replace(await taken(session, asked, **more), taken_ms=1)

    monkeypatch.setattr(AgentSession, "checkpoint", slow)
    await take(world)
    await asyncio.sleep(0.3)
    (row,) = await world.app.service.checkpoints.rows()
    assert row.kept == 1
    assert row.next_s - time.time() > 3000


async def test_all_are_deleted_only_while_nobody_decides_that_it_is_up(world):
    await up(world)
    await take(world)
    await down(world)
    service = world.app.service.checkpoints
    async with world.app.plane.deciding:
        deleting = asyncio.ensure_future(service.forget("test"))
        await asyncio.sleep(0.1)
        assert not (await document(world)).deleting
    assert await deleting == 1


def test_of_what_a_platform_tells_so_much_is_noted():
    assert noted({"output": "file[1:2]"}) == {"output": "file[1:2]"}
    much = noted({f"{number:05}" * 100: "x" * 4096 for number in range(10_000)})
    assert sum(len(key) + len(value) for key, value in much.items()) < 20_000
