"""Killed at any effect and started again, the control plane loses no checkpoint, and what it was
told to restore comes back as it was, once."""

import contextlib
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from supercloud.model.errors import SupercloudError
from support.checkpointed import PLAIN, WEB, cloud, document, manifest
from support.control import World
from support.crashes import LONG, PURGE, kills, lives, purge, run, stories, unless_dead

UP, DOWN, TAKE, BACK = "up", "down", "take", "back"
NAME = "web"

WRITES = {**WEB, "volumes": [{"name": "data", "path": "/data"}]}

REVOKED = [(TAKE, []), (DOWN, [(6, True), (7, False)]), (BACK, [(7, True)])]
"""The host revoked keys, and nobody wrote down that they are no good any more."""


class Story:
    """What is done to a U-Cloud with one EE, and what must be so afterwards.

    ``whole``: checkpoints are of its platform. ``disk``: the EE writes to a volume, too.
    """

    def __init__(self, directory: Path, *, whole: bool = False, disk: bool = False) -> None:
        self.world, self.whole, self.disk = World(directory), whole, disk
        self.written: list[str] = []  # what is on the volume
        self.snapshots: dict[int, list[str]] = {}  # by number: what was on it then
        self.name = "" if whole else NAME  # of what there are checkpoints
        self.words: list[str] = []  # what the EE has in mind; nothing while it is down
        self.taken: dict[int, list[str]] = {}  # by number: what it had in mind then
        self.newest = 0  # the number of the last one that was ever seen
        self.restores = 0  # numbers them

    async def chapter(self, what, points):
        """Pursue it through all these deaths, and then in peace. The effects of the last life."""
        seen = await lives(self.world, points, lambda: self._reach(what))
        await self._settle(what)
        await self.world.stop()
        return seen

    # -- doing it

    async def _reach(self, what):
        await unless_dead(self.world, getattr(self, f"_{what}")())

    async def _up(self):
        wish = manifest(self.world, [WEB])
        if self.disk:
            wish = manifest(self.world, [WRITES], volumes=[{"name": "data", "size": "1MiB"}])
        if self.whole:
            platform, one = {"checkpoint": {"keep": 3}}, {"hosts": "1"}
            uses = {"volumes": WRITES["volumes"]} if self.disk else {}
            more = {"volumes": [{"name": "data", "size": "1MiB"}]} if self.disk else {}
            wish = manifest(self.world, [{**PLAIN, **uses}], platform=platform, options=one, **more)
        await self.world.app.service.up(wish)
        await self.world.ready()
        if self.whole and not self.world.seam.dead.is_set():
            self.name = (await self.world.app.plane.state.platforms("test"))[0].name

    async def _down(self):
        if await self.world.app.service.uclouds():
            await self.world.app.service.down("test")
        await self.world.gone()

    async def _purge(self):
        await purge(self.world)
        await self.world.gone()
        await self.world.until(self._nothing_kept, "nothing is kept")

    async def _nothing_kept(self):
        state = self.world.app.plane.state
        return not await state.checkpoints("test") and await state.store_document("test") is None

    async def _take(self):
        await self._up()

        async def there():
            kept = await document(self.world, self.name)
            if kept is not None and kept.kept and kept.kept[-1].sequence > self.newest:
                return kept.task is None or kept.task.done
            if kept is not None and (kept.task is None or kept.task.done):
                with contextlib.suppress(SupercloudError):
                    await self.world.app.service.checkpoints.take("test", self.name)
            return False

        await self.world.until(there, "one more is there")

    async def _back(self):
        if not self.taken:
            return await self._up()
        oldest = min(self.taken)

        async def back():
            owner = await self.world.app.plane.state.ucloud("test")
            decided = owner.restores.get(self.name)
            if decided is None or decided.number == self.restores:
                with contextlib.suppress(SupercloudError):
                    await self.world.app.service.restores.restore("test", self.name, oldest, "")
                return False
            return await self.world.app.plane.restoring("test", self.name) is None

        await self._up()
        await self.world.until(back, "it is restored")
        return await self.world.ready()

    # -- how it must be then

    async def _settle(self, what):
        if what is PURGE:
            assert _stored(self.world.directory) == {}
            self.words, self.taken, self.newest, self.restores = [], {}, 0, 0
            self.written, self.snapshots = [], {}
            return
        await self.world.until(self._collected, "what is too much has left the store")
        if self.disk:
            await self.world.until(self._no_orphans, "the volume has its checkpoints' snapshots")
        if what is DOWN:
            self.words, self.restores = [], 0
            kept = await document(self.world, self.name)
            numbers = [item.sequence for item in kept.kept] if kept else []
            assert numbers == list(self.taken)
            return
        pretended = await cloud(self.world)
        kept = await document(self.world, self.name)
        numbers = [item.sequence for item in kept.kept]
        assert numbers == sorted(set(numbers))
        if what is TAKE:
            self.newest = numbers[-1]
            for n in set(numbers) - self.taken.keys():
                self.taken[n], self.snapshots[n] = list(self.words), list(self.written)
            self.taken = {n: self.taken[n] for n in numbers}
        assert numbers == list(self.taken)
        if what is BACK and self.taken:
            self.words = list(self.taken[min(self.taken)])
            self.written = list(self.snapshots[min(self.taken)])
            owner = await self.world.app.plane.state.ucloud("test")
            self.restores = owner.restores[self.name].number
        assert pretended.remembered(NAME) == self.words
        stored = _stored(self.world.directory)
        for item in kept.kept:
            assert stored[item.root] == self.taken[item.sequence]
        word = f"word {len(pretended.remembered(NAME))} of {what}"
        pretended.remember(NAME, word)
        self.words.append(word)
        if self.disk:
            volume = pretended.volumes.volumes["data"]
            assert volume.words == self.written
            for item in kept.kept:
                assert volume.snapshots[item.snapshots["data"]] == self.snapshots[item.sequence]
            pretended.volumes.write("data", word)
            self.written.append(word)

    async def _no_orphans(self):
        kept = await document(self.world, self.name)
        wanted = {item.snapshots["data"] for item in kept.kept} if kept else set()
        there = self.world.volumes()
        return "data" not in there or set(there["data"]["snapshots"]) == wanted

    async def _collected(self):
        kept = await document(self.world, self.name)
        if kept is None or kept.policy is None:
            return True
        return not kept.stale and len(kept.kept) <= kept.policy.keep


def _stored(directory):
    """The words of all that is in stores, by root."""
    found = {}
    for path in directory.glob("state/providers/*/*/checkpoints/*.json"):
        for record in msgspec.json.decode(path.read_bytes())["records"]:
            content = record["content"]
            if "platform" in content:
                (content["words"],) = content["platform"]["words"].values()
            found[record["head"]["root"]] = content["words"]
    return found


async def _tell(directory, chapters, **kind):
    story = Story(directory, **kind)
    for what, points in chapters:
        await story.chapter(what, points)
    await story.chapter(PURGE, [])
    rows, _ = await _rows(story)
    assert [row.key for row in rows if row.key.split("/")[0] in ("checkpoints", "objects")] == []


async def _rows(story):
    await story.world.start()
    rows = await story.world.store.list("")
    await story.world.stop()
    return rows


@stories(8, 100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([UP, TAKE, TAKE, TAKE, BACK, BACK, DOWN, PURGE]),
            kills(40),
        ),
        min_size=3,
        max_size=6,
    ),
    st.booleans(),
)
@example(chapters=REVOKED, disk=False)
def test_any_story_of_checkpoints_and_kills_ends_as_wished(chapters, disk):
    with tempfile.TemporaryDirectory() as directory:
        run(_tell(Path(directory), chapters, disk=disk))


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", [TAKE, BACK])
def test_every_single_effect_on_checkpoints_of_a_platform_may_be_the_last(
    after, what, disk, tmp_path
):
    async def count():
        story = Story(tmp_path / "count", whole=True, disk=disk)
        await story.chapter(TAKE, [])
        return await story.chapter(what, [])

    (tmp_path / "count").mkdir()
    life = run(count())
    assert ("provider.checkpoint" in life) == (what is TAKE)
    assert ("provider.ensure_platform" in life) == (what is BACK)
    for number in range(1, len(life) + 1, 1 if LONG else 3 + disk):
        directory = tmp_path / str(number)
        directory.mkdir()
        story = [(TAKE, []), (what, [(number, after)]), (TAKE, []), (BACK, [])]
        run(_tell(directory, story, whole=True, disk=disk))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", [TAKE, BACK, DOWN, PURGE])
def test_every_single_effect_on_checkpoints_may_be_the_last(after, what, tmp_path):
    before = [(TAKE, []), (TAKE, []), (TAKE, []), (TAKE, [])][: 3 if what is TAKE else 1]

    async def count():
        story = Story(tmp_path / "count")
        for chapter in before:
            await story.chapter(*chapter)
        return await story.chapter(what, [])

    (tmp_path / "count").mkdir()
    life = run(count())
    mine = ("checkpoint", "ucloud/", "environment/", "link.apply", "objects")
    points = [n for n, name in enumerate(life, start=1) if any(word in name for word in mine)]
    if what is TAKE:
        assert "link.checkpoint" in life
        assert "provider.checkpoint_collect" in life
    step = 1 if LONG else 2
    for number in points[after::step]:
        directory = tmp_path / str(number)
        directory.mkdir()
        run(_tell(directory, [*before, (what, [(number, after)]), (TAKE, []), (BACK, [])]))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", [TAKE, BACK])
def test_every_single_effect_on_an_environment_and_its_volume_may_be_the_last(
    after, what, tmp_path
):
    before = [(TAKE, []), (TAKE, []), (TAKE, []), (TAKE, [])][: 3 if what is TAKE else 1]

    async def count():
        story = Story(tmp_path / "count", disk=True)
        for chapter in before:
            await story.chapter(*chapter)
        return await story.chapter(what, [])

    (tmp_path / "count").mkdir()
    life = run(count())
    mine = ("checkpoint", "volume", "ucloud/", "environment/", "link.apply")
    points = [n for n, name in enumerate(life, start=1) if any(word in name for word in mine)]
    wanted = {
        TAKE: {"link.checkpoint", "provider.volume_snapshot", "provider.volume_forget"},
        BACK: {"provider.volume_detach", "provider.volume_revert", "provider.volume_attach"},
    }[what]
    assert wanted <= set(life)
    step = 1 if LONG else 3
    for number in points[after::step]:
        directory = tmp_path / str(number)
        directory.mkdir()
        story = [*before, (what, [(number, after)]), (TAKE, []), (BACK, [])]
        run(_tell(directory, story, disk=True))
