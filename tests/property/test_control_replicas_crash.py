"""Killed at any effect, and with a host lost or cut off besides, the control plane goes on: what a
volume on several hosts has answered is there, and only one of its hosts answers."""

import asyncio
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from supercloud.model.errors import BadState, NotFound, Temporary
from support.control import World, environment, manifest_of
from support.crashes import kills, lives, run, stories, unless_dead

USER = environment("db", volumes=[{"name": "data", "path": "/data"}])
VOLUMES = [{"name": "data", "size": "1MiB", "replicas": 2}]
HOSTS = ("east", "west")


class Kept:
    """A U-Cloud with one volume on two hosts, over many lives of its control plane."""

    def __init__(self, directory):
        self.world = World(Path(directory))
        self.answered = []

    async def pursue(self, begin, reached, points):
        """Through all these deaths, then in peace."""
        await lives(self.world, points, lambda: self._life(begin, reached))

    async def _life(self, begin, reached):
        if begin is not None:
            await unless_dead(self.world, begin())
        try:
            await self.world.until(reached, "what was wished for")
        except TimeoutError:
            raise AssertionError(await self.describe()) from None

    async def describe(self):
        """How it stands, for whoever reads of a failure."""
        state = self.world.app.plane.state
        owner = await state.ucloud("test")
        homes = {name: wish.host for name, wish in owner.volumes.items()} if owner else {}
        found = [await self.document(), homes, self.world.app.plane.mirrors]
        found += await state.platforms("test")
        found += await state.environments("test")
        return "\n".join(map(str, found))

    async def up(self):
        providers = [{"name": n, "kind": "fake", "options": {"hosts": "1"}} for n in HOSTS]
        body = {"volumes": VOLUMES, "providers": providers}
        await self.world.app.service.up(manifest_of(self.world.directory, [USER], **body))

    async def document(self):
        return await self.world.app.plane.state.volume("test", "data")

    def cloud(self, replica):
        return self.world.app.plane.pool.get("test", replica.provider).cloud

    async def serving(self):
        """Its user runs where it is used."""
        volume = await self.document()
        rows = await self.environments()
        if volume is None or volume.state != "attached" or not volume.mirroring:
            return False
        return [(row.state, row.host) for row in rows] == [("serving", volume.host)]

    async def environments(self):
        try:
            return await self.world.app.service.environments("test")
        except NotFound:
            return []

    async def in_sync(self):
        volume = await self.document()
        told = self.world.app.plane.mirrors.get(("test", "data"))
        if told is None or told.generation != volume.generation:
            return False
        standings = {(one.standing, one.connected) for one in told.replicas}
        recorded = all(replica.in_sync for replica in volume.replicas)
        return await self.serving() and recorded and standings == {("in_sync", True)}

    async def write(self, word):
        """As its user, who tries again what is not answered."""
        async with asyncio.timeout(20):
            while True:
                volume = await self.document()
                try:
                    self.cloud(volume).volumes.write("data", word)
                except (Temporary, BadState, KeyError):
                    await asyncio.sleep(0.01)
                else:
                    self.answered.append(word)
                    return

    async def check(self):
        """All that was answered is where it is used, in order, and nothing else."""
        volume = await self.document()
        assert not volume.halted
        there = self.cloud(volume).volumes.volumes["data"]
        assert [word for word in there.words if word in self.answered] == self.answered
        return volume


async def chapters(directory, points, *, cut):
    kept = Kept(directory)
    try:
        await kept.pursue(kept.up, kept.in_sync, points[0])
        for n in range(3):
            await kept.write(f"a{n}")
        before = await kept.check()
        lost, place = kept.cloud(before), before.host
        lost.cut_off() if cut else lost.kill()
        await kept.world.stop()

        async def elsewhere():
            volume = await kept.document()
            return await kept.serving() and volume.host != place

        await kept.pursue(None, elsewhere, points[1])
        await kept.write("b")
        volume = await kept.check()
        (old,) = volume.others
        there = kept.cloud(old).volumes.volumes["data"]
        assert there.mirror is None or there.mirror.closed_by(), "both hosts answer"
        assert "b" not in there.words
        kept.cloud(old).come_back()
        await kept.world.stop()
        await kept.pursue(None, kept.in_sync, points[2])
        await kept.write("c")
        volume = await kept.check()
        words = [kept.cloud(r).volumes.volumes["data"].words for r in volume.replicas]
        assert words[0] == words[1]
    finally:
        await kept.world.stop()


@stories(5, 60)
@given(
    points=st.tuples(*(kills(60) for _ in range(3))),
    cut=st.booleans(),
)
def test_nothing_that_was_answered_is_lost_and_only_one_answers(points, cut):
    with tempfile.TemporaryDirectory() as directory:
        run(chapters(directory, points, cut=cut), 240)
