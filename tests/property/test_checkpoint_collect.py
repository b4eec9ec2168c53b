"""Writers and collections at the same time, any of them dying at any effect: no live chunk is lost,
and what nobody needs goes."""

import io
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from supercloud.services.checkpoint.backend import Memory
from supercloud.services.checkpoint.chunks import pack_key
from supercloud.services.checkpoint.collect import Keep, collect
from supercloud.services.checkpoint.keys import Keys, Ref
from supercloud.services.checkpoint.lists import BLOCK_BYTES, PAGE_BYTES, from_uses
from supercloud.services.checkpoint.manifest import Manifest, Part, from_record, root_of
from supercloud.services.checkpoint.pages import Run
from supercloud.services.checkpoint.reader import Reader
from supercloud.services.checkpoint.retention import Retention
from supercloud.services.checkpoint.store import Checkpoint, Store
from supercloud.services.checkpoint.writer import Writer
from support.stepped import Actor

LONG = bool(os.environ.get("SUPERCLOUD_LONG"))
KEYS = Keys(bytes(range(32)), "mine")
EES = ("web", "db", "template")
PACK_BYTES = 150  # some three chunks as these are


class World:
    """The objects, what a control plane remembers, and what was written."""

    def __init__(self):
        self.shared = Memory()
        self.heads, self.images = {}, {}
        self.lives = dict.fromkeys(EES, 0)
        self.forgotten = set()
        self.tick_ms = 0

    def copy(self):
        other = World()
        other.shared.objects |= self.shared.objects
        other.heads |= self.heads
        other.images |= self.images
        return other

    def name(self, ee):
        return f"{ee}-{self.lives[ee]}"

    def store(self, backend):
        return Store(backend, KEYS, workers=0, pack_bytes=PACK_BYTES, clock_ms=lambda: self.tick_ms)

    def write(self, backend, ee, blocks, other, increment):
        """A body: one checkpoint of an EE, perhaps over an image of another EE."""
        ee, other = self.name(ee), self.name(other)
        store, head = self.store(backend), self.heads.get(ee)
        image = b"".join(bytes([value]) * BLOCK_BYTES for value in blocks)
        template = self.heads.get(other) if other != ee else None
        reuse = [store.open(other, template)] if template else []
        with Writer(store, ee, "test", head, reuse) as writer:
            if increment and reuse:
                image = self._over(writer, reuse[0], image)
            else:
                writer.write("memory", io.BytesIO(image).read)
            self.images[writer.ref.nonce] = image
            made = writer.commit()
        newest = self.heads.get(ee)
        if ee not in self.forgotten and (newest is None or newest.sequence < made.sequence):
            self.heads[ee] = made

    def _over(self, writer, below, image):
        """Write every fifth page of the template's base anew; the image that results."""
        part = below.manifest.part("memory")
        base = part.base or part.tree
        whole = read_tree(self.store(self.shared), base)
        pages = range(0, base.size_bytes // PAGE_BYTES, 5)
        for at in (page * PAGE_BYTES for page in pages):
            whole[at : at + PAGE_BYTES] = image[:PAGE_BYTES]
        taken = bytes(whole)
        runs = [Run(page, 1) for page in pages]
        writer.increment("memory", base, runs, lambda at, size: taken[at : at + size])
        return taken

    def collect(self, backend, last, give_up, forget):
        """A body: one collection with what the control plane knew when it began.

        An EE that is forgotten has another name when it comes again.
        """
        forget, gone = [self.name(ee) for ee in forget], forget
        for ee in gone:
            self.lives[ee] += 1
        keep = {
            ee: Keep(head=head, retention=Retention(last=last))
            for ee, head in self.heads.items()
            if ee not in forget
        }
        self.forgotten.update(forget)
        for ee in forget:
            self.heads.pop(ee, None)
        abandoned = (lambda _ref, _lease: True) if give_up else None
        collect(self.store(backend), keep, forget, abandoned=abandoned)

    def manifests(self) -> Iterator[Checkpoint]:
        for key, data in sorted(self.shared.objects.items()):
            if key.startswith("manifests/"):
                record = from_record(KEYS, key, data)
                if isinstance(record, Manifest):
                    yield Checkpoint(Ref.of(key), root_of(data), record)

    def check(self):
        """Every checkpoint that is in the store is whole, and each newest one is there."""
        store = self.store(self.shared)
        for checkpoint in self.manifests():
            taken = bytearray()
            Reader(store, checkpoint).stream("memory", taken.extend)
            assert bytes(taken) == self.images[checkpoint.ref.nonce]
        for ee, head in self.heads.items():
            assert store.open(ee, head).head == head


def read_tree(store, tree):
    part = Part(name="memory", tree=tree)
    manifest = Manifest(
        ucloud="mine", ee="x", sequence=1, engine="x", taken_ms=0, parts=[part]
    )  # fmt: skip
    taken = bytearray()
    Reader(store, Checkpoint(Ref(1, "", ""), "", manifest)).stream("memory", taken.extend)
    return taken


def packs_of(checkpoint):
    uses = [from_uses(tree.packs) for tree in checkpoint.manifest.trees()]
    return {pack_key(pack) for use in uses for pack in use}


ees = st.sampled_from(EES)
writes = st.tuples(
    st.just("write"), ees, st.lists(st.integers(0, 5), min_size=1, max_size=4), ees, st.booleans()
)
collections = st.tuples(
    st.just("collect"),
    st.integers(1, 2),
    st.booleans(),
    st.one_of(st.just(()), st.just(()), st.just(("web",))),
)
moves = st.one_of(writes, writes, collections, st.just(("tick",)))


def start(world, move):
    kind, *rest = move
    body = world.write if kind == "write" else world.collect
    return Actor(world.shared, lambda backend: body(backend, *rest))


@settings(
    max_examples=2000 if LONG else 120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
@given(st.lists(moves, min_size=2, max_size=12), st.randoms(use_true_random=False), st.booleans())
def test_no_live_chunk_is_lost_whoever_dies_at_whatever_effect(story, chance, deadly):
    world, alive = World(), []
    try:
        for move in story:
            if move[0] == "tick":
                world.tick_ms += 5 * 3_600_000
            else:
                alive.append(start(world, move))
            for _ in range(chance.choice((0, 1, 2, 3))):
                if alive:
                    _turn(alive, chance, deadly)
        while alive:
            _turn(alive, chance, deadly)
    finally:
        for actor in alive:
            actor.kill()
    world.check()
    _ends_clean(world)


def _turn(alive, chance, deadly):
    """One actor goes on, often the last one and often to its end: few changes find the most."""
    actor = alive[-1] if chance.random() < 0.5 else chance.choice(alive)
    for _ in range(chance.choice((1, 2, 5, chance.randrange(60), 1000, 1000))):
        if not actor.finished:
            dies = deadly and chance.random() < 0.005
            actor.step(chance.choice(("before", "after")) if dies else "")
    if actor.finished:
        alive.remove(actor)
        if actor.error is not None:
            raise actor.error


def _ends_clean(world):
    """With nobody at work, two collections leave what is live and nothing else; writing goes on."""
    world.tick_ms += 30 * 24 * 3_600_000
    for _ in range(2):
        world.collect(world.shared, 1, give_up=True, forget=())
    world.check()
    live = set().union(*map(packs_of, world.manifests()))
    kinds = {key.partition("/")[0] for key in world.shared.objects}
    assert kinds <= {"manifests", "packs"}
    assert {key for key in world.shared.objects if key.startswith("packs/")} == live
    for ee in EES:
        world.write(world.shared, ee, [1, 2, 3], ee, increment=False)
    world.check()


def _runs(actor, steps):
    while steps and not actor.finished:
        actor.step()
        steps -= 1


def _explored(world, between, first, second, pauses):
    """Whether both had still to go on after the first pause of each; four pauses in turns."""
    actors = [start(world, first)]
    try:
        _runs(actors[0], pauses[0])
        for move in between:
            start(world, move).step_to_end()
        actors.append(start(world, second))
        _runs(actors[1], pauses[1])
        goes_on = not actors[0].finished and not actors[1].finished
        _runs(actors[0], pauses[2])
        _runs(actors[1], pauses[3])
        _runs(actors[0], -1)
        _runs(actors[1], -1)
    finally:
        for actor in actors:
            actor.kill()
    assert [actor.error for actor in actors] == [None, None]
    world.check()
    return goes_on


WRITE, COLLECT = ("write", "web", [1, 4, 3], "web", False), ("collect", 1, False, ())
GIVE_UP, OVER = ("collect", 1, True, ()), ("write", "db", [7], "web", True)
ANEW = ("write", "web", [8, 9], "web", False)  # shares nothing with those before


@pytest.mark.parametrize(
    "then", [(2, 12), (2, 1000), (1000, 0), *([(1, 1), (2, 2), (4, 8)] if LONG else [])]
)
@pytest.mark.parametrize(
    ("between", "first", "second"),
    [
        ([], WRITE, COLLECT),
        ([], WRITE, GIVE_UP),
        ([ANEW], WRITE, COLLECT),  # the first one's parent is not the newest any more
        ([ANEW], OVER, COLLECT),
        ([ANEW], WRITE, GIVE_UP),
        ([WRITE], COLLECT, COLLECT),
        ([ANEW], GIVE_UP, OVER),
    ],
)
def test_no_live_chunk_is_lost_wherever_two_pause(between, first, second, then):
    """All places, not only some: of every pair of effects between which the other comes in."""
    prepared, pauses = World(), range(200)
    for blocks in ([1, 2], [1, 3]):
        prepared.write(prepared.shared, "web", blocks, "web", increment=False)
    for one in pauses:
        reached = False
        for other in pauses:
            goes_on = _explored(prepared.copy(), between, first, second, (one, other, *then))
            reached = reached or goes_on
            if not goes_on:
                break
        if not reached:
            return
    raise AssertionError("they never end")
