"""What a volume's host shows is believed only as far as it can follow what was kept."""

import asyncio
from dataclasses import replace

import pytest

from supercloud.control.documents import volume_key
from supercloud.model.errors import BadState, Denied, Temporary
from support.control import World
from support.volumes import (
    PLAIN,
    document,
    down,
    host,
    manifest,
    reaches,
    sealed,
    tells,
    told,
    up,
)


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def test_a_rollback_while_it_is_used_is_evidence_and_halts_it(world):
    await up(world)
    pretended = await host(world)
    old = pretended.copy("data")
    pretended.write("data", "newer")
    await sealed(world)
    trusted = (await document(world)).seal
    pretended.put_back(old)
    await reaches(world, "failed")
    await asyncio.sleep(0.3)
    (event,) = told(world, "evidence")
    assert event.severity == "error"
    volume = await document(world)
    assert volume.seal == trusted
    assert volume.found == old.seal
    view = await world.app.service.ucloud("test")
    assert view.state == "degraded"
    assert "accept" in view.error["hint"]


async def test_another_state_under_the_same_number_is_evidence(world):
    await up(world)
    pretended = await host(world)
    pretended.write("data", "one")
    await sealed(world)
    pretended.volumes["data"].words[-1] = "two"
    volume = await reaches(world, "failed")
    assert "another one than it was" in volume.halted
    assert await tells(world, "evidence")


async def test_blocks_that_fail_are_evidence_and_the_volume_goes_on(world):
    await up(world)
    pretended = await host(world)
    pretended.volumes["data"].evidence = 3
    (event,) = await tells(world, "evidence")
    assert (event.severity, "3 blocks" in event.message) == ("error", True)
    assert (await document(world)).state == "attached"


async def rolled_back(world):
    """A volume whose disk was put back, while it was closed, to before the last opening."""
    await up(world)
    pretended = await host(world)
    pretended.write("data", "old")
    await down(world)
    old = pretended.copy("data")
    await up(world)
    pretended = await host(world)
    pretended.write("data", "new")
    await down(world)
    pretended.put_back(old)
    return old


async def test_a_rolled_back_volume_is_not_opened_and_not_tried_again(world):
    old = await rolled_back(world)
    await world.app.service.up(manifest(world))
    volume = await reaches(world, "failed")
    assert "rolled back" in volume.halted
    assert volume.found == old.seal
    (event,) = await tells(world, "refused")
    assert event.severity == "error"
    opened = []
    pretended = await host(world)
    opening = pretended.open
    pretended.open = lambda *asked: opened.append(asked) or opening(*asked)
    await asyncio.sleep(0.3)
    await world.stop()
    await world.start()
    await asyncio.sleep(0.3)
    assert opened == []
    assert len(told(world, "refused")) == 1
    assert pretended.volumes["data"].state == "closed"
    (row,) = await world.app.service.environments("test")
    assert row.state != "serving"


async def test_even_without_a_write_a_copy_from_before_the_last_opening_is_refused(world):
    await up(world)
    await down(world)
    pretended = await host(world)
    old = pretended.copy("data")
    await up(world)
    await down(world)
    (await host(world)).put_back(old)
    await world.app.service.up(manifest(world))
    assert "rolled back" in (await reaches(world, "failed")).halted


async def test_its_user_may_accept_what_is_there_and_is_told_what_that_costs(world):
    old = await rolled_back(world)
    await world.app.service.up(manifest(world))
    trusted = (await reaches(world, "failed")).seal
    volumes = world.app.service.volumes
    with pytest.raises(Denied, match="would be lost") as caught:
        await volumes.accept("test", "data", "")
    assert old.seal.root[:12] in caught.value.hint
    with pytest.raises(Denied):
        await volumes.accept("test", "data", trusted.root[:12])
    await volumes.accept("test", "data", old.seal.root[:12])
    await world.ready()
    assert (await host(world)).volumes["data"].words == ["old"]
    volume = await document(world)
    assert volume.seal.epoch > trusted.epoch  # no epoch is used twice
    (event,) = told(world, "accepted")
    assert (event.severity, event.details["before"]) == ("warning", trusted.root)
    with pytest.raises(BadState, match="nothing to accept"):
        await volumes.accept("test", "data", "")


async def test_a_halted_one_does_not_stand_in_the_way_of_down(world):
    await rolled_back(world)
    await world.app.service.up(manifest(world))
    trusted = (await reaches(world, "failed")).seal
    await down(world)
    volume = await document(world)
    assert (volume.state, volume.seal, volume.opened) == ("failed", trusted, False)


async def test_one_that_went_back_while_used_is_let_go_by_down(world):
    await up(world)
    pretended = await host(world)
    old = pretended.copy("data")
    pretended.write("data", "newer")
    await sealed(world)
    pretended.put_back(old)
    trusted = (await reaches(world, "failed")).seal
    await down(world)
    assert pretended.volumes["data"].state == "closed"
    assert (await document(world)).seal == trusted


async def test_a_volume_that_its_host_lost_is_said_to_be_lost_and_not_made_anew(world):
    await up(world)
    await down(world)
    lost = (await host(world)).lose("data")
    await world.app.service.up(manifest(world))
    volume = await reaches(world, "failed")
    assert "has no volume data" in volume.halted
    assert world.volume_creations() == ["data"]
    (await host(world)).put_back(lost)  # its provider finds it again
    await world.app.service.volumes.accept("test", "data", "")
    await world.ready()
    assert world.volume_creations() == ["data"]


async def test_a_volume_that_vanishes_while_it_is_used_is_said_to(world):
    await up(world)
    (await host(world)).lose("data")
    volume = await reaches(world, "failed")
    assert "does not have it any more" in volume.halted


async def test_its_host_is_asked_again_and_again_as_often_as_the_pace_says(world, monkeypatch):
    await up(world)
    pretended, polled = await host(world), []
    sealing = world.app._volumes.sealing
    poll = sealing.poll

    async def polling(*key):
        polled.append(await poll(*key))
        return polled[-1]

    monkeypatch.setattr(sealing, "poll", polling)
    for number in range(4):
        pretended.write("data", f"word {number}")
        before = len(polled)
        await sealed(world)

        async def again(before=before):
            return len(polled) > before + 1

        await world.until(again, "it is asked though nothing happens")
    assert set(polled) == {world.pace.seal_s}


async def test_a_host_that_does_not_answer_is_told_of_once_for_the_window_grows(world):
    await up(world)
    pretended = await host(world)
    listing = pretended.list

    async def silent():
        raise Temporary("cannot be reached", delay_s=60.0)

    pretended.list = silent
    await tells(world, "silent")
    await asyncio.sleep(0.4)
    assert len(told(world, "silent")) == 1
    row = (await world.app.service.volumes.rows())[0]
    assert row.seal_age_s >= 0.3
    assert row.state == "attached"
    pretended.list = listing
    pretended.write("data", "x")
    await sealed(world)


async def test_a_volume_of_no_record_is_told_of_and_not_touched(world):
    await up(world)
    pretended = await host(world)
    stranger = pretended.copy("data")
    stranger.spec = replace(stranger.spec, name="stranger")
    stranger.state, stranger.platform, stranger.slot = "closed", "", 0
    pretended.put_back(stranger)
    await tells(world, "unknown")
    await asyncio.sleep(0.2)
    assert len(told(world, "unknown")) == 1
    await down(world)
    assert world.volumes().keys() == {"data", "stranger"}


async def test_a_list_that_comes_late_is_no_evidence(world):
    """It tells of a moment before the calls that went on meanwhile, and is not believed."""
    await up(world)
    volumes_of = type(await host(world))
    listing = volumes_of.list

    async def slow(self):
        listed = await listing(self)
        await asyncio.sleep(0.03)
        return listed

    volumes_of.list = slow
    try:
        for number in range(4):
            (await host(world)).write("data", f"word {number}")
            await world.app.service.volumes.task("test", "data", "snapshot", f"s{number}")
            await up(world, [PLAIN])
            await reaches(world, "kept")
            await up(world)
            await reaches(world, "attached")
    finally:
        volumes_of.list = listing
    assert told(world, "evidence") == told(world, "refused") == []
    assert len((await host(world)).volumes["data"].words) == 4


async def test_a_provider_that_refuses_us_says_nothing_of_the_volume(world):
    await up(world)
    await down(world)
    pretended = await host(world)
    opening = pretended.open

    async def refuses(*_: object) -> None:
        raise Denied("fake refuses our certificate: expired")

    pretended.open = refuses
    await world.app.service.up(manifest(world))
    async with asyncio.timeout(30):
        while not (volume := await document(world)).error:
            await asyncio.sleep(0.01)
    assert "certificate" in volume.error["message"]
    assert not volume.halted
    pretended.open = opening
    world.app.plane.look(volume_key("test", "data"), 0.0)
    await world.ready()
    assert told(world, "refused") == []
