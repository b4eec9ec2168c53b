"""Mirrors, an owner, and a world that kills, cuts, delays and reorders: nothing answered is lost.

Every region is a register. ``allowed`` are the values that it may have: the last that was answered
(written or read), and what was asked later and never answered. It holds for each answer of any
generation, and at each moment for every replica that the owner has down as in sync.
"""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import SupercloudError
from supercloud.services.replication import nbd
from supercloud.services.replication.unsettled import Unsettled
from support.mirror import MS, REGION, VALID_MS, Disk, FakeLink, Memory, Running, start

REGIONS = 3
NAMES = ("a", "b", "c")


@dataclass(eq=False)
class Written:
    value: int
    number: int  # in the order of asking
    generation: int
    answered: bool = False


@dataclass
class Record:
    """What the owner keeps durably."""

    generation: int = 0
    in_sync: set[str] = field(default_factory=set)
    turns: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)  # crashes of a device that it has made good
    lease_over_ns: int = 0


class World:
    def __init__(self, names: tuple[str, ...], rnd: random.Random) -> None:
        self.rnd, self.now_ns, self.count = rnd, 0, 0
        self.disks = {name: Disk(REGIONS) for name in names}
        self.memories = {name: Memory(REGIONS) for name in names}
        self.record = Record(0, set(names), seen=dict.fromkeys(names, 0))
        self.pending_seen: dict[str, int] = {}
        self.running: dict[str, Running] = {}  # by the host that it runs on
        self.current = names[0]
        self.messages: list[tuple[int, str, dict[str, Any]]] = []
        self.to_mirror: list[tuple[Running, Callable[[], None]]] = []
        self.stamp: tuple[int, int] | None = None
        self.allowed: list[int] = [0] * REGIONS  # the last that was answered
        self.last: list[tuple[int, int]] = [(0, 0)] * REGIONS  # its number and generation
        self.open_writes: list[tuple[int, Written]] = []
        self.answers = 0
        self.giving_up = False  # the owner grants no more, so that a new generation may begin
        self.open(names[0], set(names), clean=True)

    # -- what may be where

    def may(self, region: int) -> set[int]:
        number, generation = self.last[region]
        later = {
            w.value
            for at, w in self.open_writes
            if at == region and w.number > number and w.generation >= generation
        }
        return later | {self.allowed[region]}

    def check(self) -> None:
        for name in self.kept() & self.record.in_sync:
            for region, value in enumerate(self.disks[name].now):
                assert value in self.may(region), (name, region, value, self.may(region))

    def kept(self) -> set[str]:
        return {n for n, disk in self.disks.items() if disk.crashes == self.record.seen[n]}

    # -- the owner

    def open(self, host: str, connected: set[str], *, clean: bool = False) -> None:
        record = self.record
        record.generation += 1
        record.turns = dict.fromkeys(self.disks, 0)
        for name in connected:
            self.disks[name].end_connections()
            self.pending_seen[name] = self.disks[name].crashes
        if host in self.running:
            self.running.pop(host).close()
        self.current, self.stamp, self.giving_up = host, None, False
        self.running[host] = start(
            self.memories[host], record.generation, self.disks, record.in_sync, self.kept(),
            connected, lambda: self.now_ns, clean=clean,
        )  # fmt: skip
        for member in self.running[host].mirror.members:
            if member.standing == "in_sync":  # the map says that it lost nothing
                record.seen[member.name] = self.pending_seen[member.name]

    def promote(self) -> None:
        alive = self.running.get(self.current)
        if alive is not None and not alive.mirror.over and self.now_ns <= self.record.lease_over_ns:
            return
        usable = sorted(self.kept() & self.record.in_sync)
        host = self.rnd.choice(usable)
        others = {name for name in self.disks if self.rnd.random() < 0.6}
        self.open(host, others | {host})

    def hear(self) -> None:
        for running in self.running.values():
            for method, what in running.told:
                if method in ("replica.stale", "replica.resynced"):
                    generation = running.mirror.lease.generation
                    self.messages.append((generation, method, dict(what)))
            running.told.clear()

    def handle(self) -> None:
        """One message, of any age; it may have been lost, or be handled again later."""
        self.hear()
        if not self.messages:
            return
        message = self.rnd.choice(self.messages)
        if self.rnd.random() < 0.7:
            self.messages.remove(message)
        generation, method, what = message
        name, turn, record = what["replica"], what["turn"], self.record
        running = self.running.get(self.current)
        if generation != record.generation or turn < record.turns[name] or running is None:
            return
        in_sync = method == "replica.resynced"
        if turn > record.turns[name]:
            if not in_sync and not self.kept() & record.in_sync - {name}:
                return  # never the last that has everything
            record.turns[name] = turn
            if in_sync:
                record.in_sync.add(name)
                record.seen[name] = self.pending_seen[name]
            else:
                record.in_sync.discard(name)
        mirror = running.mirror
        confirm = mirror.confirm_in_sync if in_sync else mirror.confirm_stale
        call = (running, lambda: confirm(name, turn))
        self.to_mirror += [call] * self.rnd.choice((1, 1, 2))

    def give_up(self) -> None:
        self.giving_up = True

    def ask_stamp(self) -> None:
        running = self.running.get(self.current)
        if running is not None:
            self.stamp = (self.record.generation, running.mirror.lease.stamp())

    def grant(self) -> None:
        running = self.running.get(self.current)
        if running is None or self.stamp is None or self.stamp[0] != self.record.generation:
            return
        if self.giving_up:
            return
        generation, stamp = self.stamp
        self.record.lease_over_ns = max(self.record.lease_over_ns, self.now_ns + VALID_MS * MS)
        self.to_mirror.append((running, lambda: running.mirror.renew(generation, stamp, VALID_MS)))

    def reach(self) -> None:
        """A call of the owner arrives, if ever."""
        if self.to_mirror:
            running, call = self.to_mirror.pop(self.rnd.randrange(len(self.to_mirror)))
            if running in self.running.values() and not running.mirror.over:
                call()

    def fence(self) -> None:
        for running in self.running.values():
            running.mirror.fence(self.record.generation)

    def attach(self) -> None:
        running = self.running.get(self.current)
        if running is None or running.mirror.over:
            return
        gone = [member for member in running.mirror.members if member.link is None]
        if gone:
            name = self.rnd.choice(gone).name
            self.disks[name].end_connections()
            self.pending_seen[name] = self.disks[name].crashes
            running.mirror.attach(name, FakeLink(self.disks[name]))

    # -- whoever uses it

    def somewhere(self) -> Running | None:
        return self.rnd.choice([*self.running.values()]) if self.running else None

    def write(self) -> None:
        running, region = self.somewhere(), self.rnd.randrange(REGIONS)
        if running is None or running.mirror.over or self.count > 250:
            return
        self.count += 1
        asked = Written(self.count, self.count, running.mirror.lease.generation)
        self.open_writes.append((region, asked))

        def done(error: int, _: Any) -> None:
            assert not error
            self.answered(region, asked.value, asked.number, asked.generation)

        data = bytes([asked.value]) * REGION
        running.mirror.submit(nbd.WRITE, region * REGION, REGION, data, 0, done)

    def read(self) -> None:
        running, region = self.somewhere(), self.rnd.randrange(REGIONS)
        if running is None or running.mirror.over:
            return
        self.count += 1
        number, generation = self.count, running.mirror.lease.generation

        def done(error: int, data: Any) -> None:
            assert not error
            assert data[0] in self.may(region), (region, data[0], self.may(region))
            self.answered(region, data[0], number, generation)

        running.mirror.submit(nbd.READ, region * REGION, REGION, b"", 0, done)

    def answered(self, region: int, value: int, number: int, generation: int) -> None:
        assert generation == self.record.generation  # a lease is over before the next begins
        assert generation >= self.last[region][1]
        self.answers += 1
        self.allowed[region], self.last[region] = value, (number, generation)

    def flush(self) -> None:
        running = self.somewhere()
        if running is not None and not running.mirror.over:
            running.mirror.submit(nbd.FLUSH, 0, 0, b"", 0, lambda *_: None)

    # -- the world

    def links(self) -> list[FakeLink]:
        return [link for disk in self.disks.values() for link in disk.links]

    def serve(self) -> None:
        for link in self.links():
            link.serve(self.rnd)

    def deliver(self) -> None:
        for link in self.links():
            link.deliver(self.rnd)

    def pass_time(self) -> None:
        self.now_ns += self.rnd.randrange(1500) * MS

    def later(self) -> None:
        self.now_ns = max(self.now_ns, self.record.lease_over_ns) + 1

    def notice(self) -> None:
        for running in self.running.values():
            for member in running.mirror.members:
                if isinstance(member.link, FakeLink) and (member.link.dead or member.link.cut):
                    running.mirror.fail(member, "gone")

    def impatient(self) -> None:
        for running in self.running.values():
            running.mirror.look(15)

    def remind(self) -> None:
        for running in self.running.values():
            if not running.mirror.over:
                running.mirror.remind()

    def cut(self) -> None:
        """The mirror's side of a connection is gone, what is in it may arrive yet."""
        if links := self.links():
            self.rnd.choice(links).dead = True

    def kill_disk(self, name: str = "") -> None:
        name = name or self.rnd.choice([*self.disks])
        if name in self.record.in_sync and not (self.kept() & self.record.in_sync) - {name}:
            self.disks[name].durable = list(self.disks[name].now)  # the last copy does not crash
            return
        self.disks[name].kill(self.rnd)

    def kill_service(self, host: str = "") -> None:
        if self.running:
            host = host or self.rnd.choice([*self.running])
            running = self.running.pop(host, None)
            if running is not None:
                running.close()

    def lose_host(self) -> None:
        host = self.rnd.choice([*self.disks])
        self.kill_service(host)
        self.kill_disk(host)
        self.memories[host].close()
        self.memories[host] = Memory(REGIONS)

    def serves_again(self) -> bool:
        """What was asked of the newest generation, and one read more, is answered."""
        before, running = self.answers, self.running[self.current]
        self.running = {self.current: running}
        self.read()
        for _ in range(2000):
            self.ask_stamp(), self.grant()
            while self.to_mirror:
                self.reach()
            self.serve(), self.deliver(), self.check()
            if self.answers > before and not running.mirror._under_way:
                return True
        return False

    def close(self) -> None:
        for running in self.running.values():
            running.close()
        for memory in self.memories.values():
            memory.close()


OFTEN = ("write", "read", "serve", "deliver", "ask_stamp", "grant", "reach", "handle", "notice")
SELDOM = (
    "flush", "pass_time", "impatient", "remind", "cut", "kill_disk", "kill_service", "lose_host",
    "promote", "attach", "attach", "fence", "give_up",
)  # fmt: skip


def settle(world: World) -> None:
    """Everything heals: the newest generation must serve again, all replicas in sync."""
    world.giving_up = False
    running = world.running.get(world.current)
    if running is None or running.mirror.over:
        world.later()
        world.promote()
    for _ in range(400):
        running = world.running[world.current]
        if running.mirror.over:
            world.later()
            world.promote()
        world.ask_stamp(), world.grant(), world.notice(), world.attach(), world.remind()
        for _ in range(6):
            world.handle(), world.serve(), world.deliver()
        while world.to_mirror:
            world.reach()
        world.check()
        if all(m.standing == "in_sync" for m in running.mirror.members):
            return
    raise AssertionError([(m.name, m.standing, m.turn) for m in running.mirror.members])


@settings(max_examples=2500, deadline=None, print_blob=True)
@given(st.integers(0, 1 << 48), st.sampled_from((NAMES[:2], NAMES)), st.integers(1, 800))
def test_nothing_that_was_answered_is_ever_missing(
    seed: int, names: tuple[str, ...], length: int
) -> None:
    rnd = random.Random(seed)
    often = rnd.choice((1, 3, 8))  # how many steps of work there are between two of trouble
    steps = rnd.choices(OFTEN + SELDOM, [often] * len(OFTEN) + [1] * len(SELDOM), k=length)
    world = World(names, rnd)
    try:
        for step in steps:
            with contextlib.suppress(SupercloudError):  # refused, as a late owner may be
                getattr(world, step)()
            world.check()
        settle(world)
        assert world.serves_again()
    finally:
        world.close()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(0, 2)), max_size=60))
def test_a_region_is_settled_only_by_a_flush_after_its_last_write(
    steps: list[tuple[int, int, int]],
) -> None:
    memory = Memory(9)
    running = start(memory, 1, {"a": Disk(9)}, {"a"}, {"a"}, {"a"}, lambda: 0, clean=True)
    try:
        sets = Unsettled(running.map.unsettled)
        under_way: list[range] = []
        flushes: list[tuple[int, set[int]]] = []
        dirty: set[int] = set()  # written since a flush began that ended well
        written: set[int] = set()
        for first, count, what in steps:
            regions = range(first, first + count)
            if what == 0:
                sets.begin(regions)
                under_way.append(regions)
                dirty |= set(regions)
            elif what == 1 and under_way:
                ended = under_way.pop(0)
                sets.end(ended)
                written |= set(ended)
            elif what == 2 and flushes:
                number, taken = flushes.pop(0)
                sets.flushed(number, well=True)
                busy = {r for regions in under_way for r in regions} | written
                dirty -= taken - busy - {r for _, other in flushes for r in other}
            elif what == 2:
                flushes.append((sets.flush(), set(written)))
                written = set()
            assert set(sets.bits) == dirty
    finally:
        running.close()
        memory.close()
