"""Clones and backups of volumes: made once, made again, and whatever dies they come to an end."""

import asyncio

import pytest

from supercloud.control.documents import volume_key
from supercloud.model.errors import BadState, Busy, Invalid, NotFound, Permanent
from support.control import World, environment
from support.volumes import DATA, document, down, host, manifest, reaches, told, up, vanishes

BASE = {"name": "data", "size": "64MiB"}
CLONE = {"name": "copy", "size": "64MiB", "clone": {"of": "data", "snapshot": "first"}}
BACKUP = {"name": "safe", "size": "64MiB", "backup": {"of": "data"}}
USER = environment("other", volumes=[{"name": "copy", "path": "/data"}])


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def written(world, *words):
    pretended = await host(world)
    for word in words:
        pretended.write("data", word)


async def words(world, name):
    return (await host(world)).volumes[name].words


async def copied(world, name, number=1):
    async def done():
        volume = await document(world, name)
        return volume is not None and volume.copied >= number

    await world.until(done, f"{name} is copied")


async def snapshotted(world):
    await up(world)
    await written(world, "one", "two")
    await world.app.service.volumes.task("test", "data", "snapshot", "first")
    await written(world, "three")


async def test_a_clone_begins_as_the_snapshot_and_under_a_key_of_its_own(world):
    await snapshotted(world)
    applied = await up(world, (DATA, USER), [BASE, CLONE])
    (change,) = [c for c in applied.plan.changes if c.subject == "volume/copy"]
    assert "a clone of data at first" in change.details
    assert await words(world, "copy") == ["one", "two"]
    pretended = await host(world)
    keys = {pretended.volumes[name].key_sha256 for name in ("data", "copy")}
    assert len(keys) == 2
    pretended.write("copy", "mine")
    await down(world)
    await up(world, (DATA, USER), [BASE, CLONE])
    assert await words(world, "copy") == ["one", "two", "mine"]  # made once
    assert await words(world, "data") == ["one", "two", "three"]
    assert (await document(world, "copy")).copied == 1


async def test_its_user_does_not_have_it_before_it_is_whole(world):
    await snapshotted(world)
    (await host(world))._cloud.fail("copy", 3)
    await world.app.service.up(manifest(world, (DATA, USER), [BASE, CLONE]))
    pretended, seen = await host(world), set()

    async def attached():
        there = pretended.volumes.get("copy")
        if there is not None and there.state == "attached":
            seen.add(tuple(there.words))
        return bool(seen)

    await world.until(attached, "it is attached")
    assert seen == {("one", "two")}


async def test_one_that_nobody_uses_is_made_and_closed(world):
    await snapshotted(world)
    await up(world, (DATA,), [BASE, CLONE])
    await copied(world, "copy")
    await reaches(world, "kept", "copy")
    assert await words(world, "copy") == ["one", "two"]
    assert (await document(world)).state == "attached"


async def test_a_clone_of_what_is_not_there_is_refused(world):
    with pytest.raises(Invalid, match="that there is") as caught:
        await world.app.service.plan(manifest(world, (DATA, USER), [BASE, CLONE]))
    assert caught.value.where.endswith(" volumes[1].clone.of")
    await snapshotted(world)
    larger = CLONE | {"size": "65MiB"}
    with pytest.raises(Invalid, match="which data has"):
        await world.app.service.plan(manifest(world, (DATA, USER), [BASE, larger]))
    other = CLONE | {"clone": {"of": "data", "snapshot": "second"}}
    await world.app.service.up(manifest(world, (DATA, USER), [BASE, other]))

    async def refused():
        volume = await document(world, "copy")
        return volume is not None and volume.error is not None

    await world.until(refused, "it is refused")
    assert "no snapshot second" in (await document(world, "copy")).error["message"]
    assert (await document(world)).state == "attached"


@pytest.mark.parametrize("wish", [CLONE, BACKUP | {"name": "copy"}])
async def test_what_is_on_a_volume_is_not_copied_over_for_a_word_in_the_manifest(world, wish):
    plain = {"name": "copy", "size": "64MiB"}
    await snapshotted(world)
    await up(world, (DATA, USER), [BASE, plain])
    (await host(world)).write("copy", "mine")
    await down(world)
    with pytest.raises(Invalid, match="has what was written to it") as caught:
        await world.app.service.up(manifest(world, (DATA,), [BASE, wish]))
    assert caught.value.where.partition(" ")[2].startswith("volumes[1].")
    await up(world, (DATA, USER), [BASE, plain])
    assert await words(world, "copy") == ["mine"]


async def test_a_clone_that_is_written_to_does_not_become_a_backup_but_a_volume_of_its_own(world):
    await snapshotted(world)
    await up(world, (DATA, USER), [BASE, CLONE])
    (await host(world)).write("copy", "mine")
    with pytest.raises(Invalid, match="has what was written to it"):
        await world.app.service.up(manifest(world, (DATA,), [BASE, BACKUP | {"name": "copy"}]))
    await up(world, (DATA, USER), [BASE, {"name": "copy", "size": "64MiB"}])
    assert await words(world, "copy") == ["one", "two", "mine"]


async def test_a_clone_that_could_not_be_made_is_corrected_in_the_manifest(world):
    await snapshotted(world)
    other = CLONE | {"clone": {"of": "data", "snapshot": "second"}}
    await world.app.service.up(manifest(world, (DATA, USER), [BASE, other]))

    async def refused():
        volume = await document(world, "copy")
        return volume is not None and volume.error is not None

    await world.until(refused, "it is refused")
    await up(world, (DATA, USER), [BASE, CLONE])
    assert await words(world, "copy") == ["one", "two"]


async def test_a_backup_is_made_at_once_and_when_it_is_asked_for(world):
    await world.app.service.up(manifest(world, (DATA,), [BASE, BACKUP]))
    await copied(world, "safe")
    await reaches(world, "attached")
    await reaches(world, "kept", "safe")
    await written(world, "one")
    await asyncio.sleep(0.3)
    assert await words(world, "safe") == []
    view = await world.app.service.volumes.task("test", "safe", "backup", "")
    assert (view.copy_of, view.copied_s > 0) == ("data", True)
    assert await words(world, "safe") == ["one"]
    await reaches(world, "kept", "safe")
    assert len(told(world, "copied")) == 2
    with pytest.raises(BadState, match="a backup of nothing"):
        await world.app.service.volumes.task("test", "data", "backup", "")


async def test_a_backup_is_made_again_after_its_time(world):
    hourly = BACKUP | {"backup": {"of": "data", "every": "1h"}}
    await up(world, (DATA,), [BASE, hourly])
    await copied(world, "safe")
    await written(world, "one")
    await reaches(world, "kept", "safe")
    await world.app.plane.state.change(
        await document(world, "safe"), lambda fresh: setattr(fresh, "copied_s", 1.0)
    )
    world.app.plane.look(volume_key("test", "safe"), 0.0)
    await copied(world, "safe", 2)
    assert await words(world, "safe") == ["one"]


async def test_a_backup_of_what_is_kept_while_nothing_runs(world):
    await up(world, (DATA,), [BASE, BACKUP])
    await copied(world, "safe")
    await written(world, "one")
    await down(world)
    await world.app.service.volumes.task("test", "safe", "backup", "")
    assert await words(world, "safe") == ["one"]
    for name in ("data", "safe"):
        await reaches(world, "kept", name)


async def test_a_copy_that_fails_is_told_and_tried_again_when_it_is_asked_for(world):
    await up(world, (DATA,), [BASE, BACKUP])
    await copied(world, "safe")
    pretended = await host(world)
    fill, fails = pretended.fill, [Permanent("the disk is full")]

    async def failing(at, asked):
        if fails:
            raise fails.pop()
        return await fill(at, asked)

    pretended.fill = failing
    with pytest.raises(Permanent, match="full"):
        await world.app.service.volumes.task("test", "safe", "backup", "")
    assert (await document(world, "safe")).copying == 1
    await written(world, "one")
    await world.app.service.volumes.task("test", "safe", "backup", "")
    assert await words(world, "safe") == ["one"]


async def test_a_source_that_is_being_copied_elsewhere_is_waited_for(world):
    await up(world, (DATA,), [BASE, BACKUP])
    await copied(world, "safe")
    pretended = await host(world)
    fill, busy = pretended.fill, [Busy("a clone of data is under way")] * 3

    async def occupied(at, asked):
        if busy:
            raise busy.pop()
        return await fill(at, asked)

    pretended.fill = occupied
    await world.app.service.volumes.task("test", "safe", "backup", "")
    volume = await document(world, "safe")
    assert (volume.copied, volume.error) == (2, None)


async def test_down_with_volumes_amid_a_copy_leaves_nothing(world):
    await snapshotted(world)
    await world.app.service.up(manifest(world, (DATA, USER), [BASE, CLONE]))

    async def begun():
        volume = await document(world, "copy")
        return volume is not None and volume.copying == 1

    await world.until(begun, "it is being copied")
    await down(world, purge=True)
    await vanishes(world)
    with pytest.raises(NotFound):
        await world.app.service.volumes.volume("test", "copy")


@pytest.mark.parametrize(
    ("volumes", "wish", "message"),
    [
        ([BASE, BACKUP | {"size": "1GiB"}], (DATA,), "which data has"),
        ([BASE, BACKUP | {"backup": {"of": "nothing"}}], (DATA,), "a volume of this manifest"),
        ([BASE, CLONE | {"backup": {"of": "data"}}], (DATA,), "one of them"),
        ([BASE, CLONE | {"replicas": 2}], (DATA,), "several hosts"),
        ([BASE | {"replicas": 2}, BACKUP], (DATA,), "several hosts"),
        ([BASE | {"backup": {"of": "data"}}], (), "a copy of itself"),
        (
            [BASE, BACKUP],
            (DATA, environment("x", volumes=[{"name": "safe", "path": "/x"}])),
            "which environment 'x' uses",
        ),
    ],
)
async def test_what_cannot_be_a_copy_is_refused_in_the_manifest(world, volumes, wish, message):
    with pytest.raises(Invalid, match=message):
        await world.app.service.plan(manifest(world, wish, volumes))
