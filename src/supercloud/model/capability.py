"""Capabilities: rights, object types, limits, and the graph of who holds what from whom.

A capability is an entry of one *holder*'s table: an object, rights, a name (unique in the table,
or empty), and the capability that it was derived from. A holder names it by its *selector*.
Deriving needs ``GRANT`` and never widens; revoking takes away all that was derived.
The terms are those of NOVA (Steinberg and Kauer, EuroSys 2010).
"""

from collections import defaultdict
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import NamedTuple

from supercloud.model.refusals import Denied, Exists, NoResources, NotFound

MAX_TABLE_ENTRIES = 4096
SELF, SCHEDULING = 0, 1  # selectors of the domain and of its scheduling context in its own table


class Rights(IntFlag):
    """What a capability lets its holder do."""

    NONE = 0
    USE = 1  # take the descriptor
    READ = 2  # memory: map for reading; scheduling context: see its usage
    WRITE = 4  # memory: map for writing
    GRANT = 8  # delegate it on, never wider
    CONTROL = 16  # start, adjust, destroy
    CHARGE = 32  # scheduling context: book memory, domains and disk on it
    CONNECT = 64  # domain: make channels to it and delegate to it


class ObjectType(IntEnum):
    """Kinds of kernel objects. A domain's one execution context is part of the domain."""

    DOMAIN = 1
    SCHEDULING_CONTEXT = 2
    PORTAL = 3
    SEMAPHORE = 4
    MEMORY = 5
    DEVICE = 6


# A mapping or an open file of these cannot be undone: revoking one that was taken kills its
# holder. A portal is shut down; the others have no descriptor.
KILLS = frozenset({ObjectType.SEMAPHORE, ObjectType.MEMORY, ObjectType.DEVICE})


class Limits(NamedTuple):
    """What a scheduling context may use. In its parent, all but the cpu figures are summed."""

    cpu_weight: int = 100  # 1..10000, relative to its siblings
    cpu_permille: int = 0  # of one CPU; 0: as much as the parent
    memory_bytes: int = 0
    pids: int = 0
    domains: int = 0  # that may be made within it
    disk_bytes: int = 0


@dataclass(slots=True, eq=False)
class Capability:
    """One entry of a table. ``end`` tells the two ends of a portal apart (-1: the whole of it)."""

    holder: int
    selector: int
    object_id: int
    type: ObjectType
    rights: Rights
    name: str
    parent: "Capability | None"
    end: int = -1
    taken: bool = False
    children: "dict[Capability, None]" = field(default_factory=dict)  # as an ordered set

    def subtree(self) -> "list[Capability]":
        """This capability and all derived from it, parents first, however long the chains."""
        found = [self]
        for one in found:  # which grows meanwhile
            found += one.children
        return found


class CapabilityGraph:
    """Every table of a host. Object and holder ids are the caller's, unique and never reused."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[int | str, Capability]] = {}  # by selector
        self._names: dict[int, dict[int | str, Capability]] = {}
        self._objects = defaultdict[int, dict[Capability, None]](dict)
        self._next: dict[int, int] = {}

    def open_table(self, holder: int) -> None:
        """Give ``holder`` an empty table."""
        self._tables[holder], self._names[holder], self._next[holder] = {}, {}, 0

    def close_table(self, holder: int) -> list[Capability]:
        """Remove ``holder``'s table; what it held, and all derived from that, in one list."""
        gone: list[Capability] = []
        while table := self._tables[holder]:
            gone += self.revoke(next(iter(table.values())), keep=False)
        del self._tables[holder], self._names[holder], self._next[holder]
        return gone

    def get(self, holder: int, which: int | str) -> Capability:
        """The entry of that selector or name, or :class:`NotFound`."""
        entries = (self._tables if isinstance(which, int) else self._names)[holder]
        if which not in entries:
            raise NotFound(f"no capability {which!r}")
        return entries[which]

    def entries(self, holder: int) -> list[Capability]:
        """All entries of a table, by selector."""
        return list(self._tables[holder].values())

    def of_object(self, object_id: int) -> list[Capability]:
        """All capabilities to an object."""
        return list(self._objects.get(object_id, ()))

    def check_room(self, *entries: tuple[int, str]) -> None:
        """Raise unless there is room for all these entries, each a holder and a name."""
        for holder, name in entries:
            more = sum(other == holder for other, _ in entries)
            if len(self._tables[holder]) + more > MAX_TABLE_ENTRIES:
                raise NoResources(f"the table is full ({MAX_TABLE_ENTRIES} entries)")
            if name and (name in self._names[holder] or entries.count((holder, name)) > 1):
                raise Exists(f"a capability named {name!r} is in the table already")

    def insert(
        self, holder: int, object_id: int, type_: ObjectType, rights: Rights, name: str,
        parent: Capability | None = None, end: int = -1,
    ) -> Capability:  # fmt: skip
        """Add an entry; checks room, nothing else."""
        self.check_room((holder, name))
        selector = self._next[holder]
        entry = Capability(holder, selector, object_id, type_, rights, name, parent, end)
        self._next[holder] += 1
        self._tables[holder][selector], self._objects[object_id][entry] = entry, None
        if name:
            self._names[holder][name] = entry
        if parent is not None:
            parent.children[entry] = None
        return entry

    def check_derive(self, source: Capability, holder: int, rights: Rights, name: str) -> None:
        """Raise unless ``source`` may be delegated to ``holder`` with these rights."""
        if not source.rights & Rights.GRANT or rights & ~source.rights:
            raise Denied(f"{rights | Rights.GRANT!r} must be held, {source.rights!r} is")
        self.check_room((holder, name))

    def derive(self, source: Capability, holder: int, rights: Rights, name: str) -> Capability:
        """Delegate ``source`` to ``holder``; see :meth:`check_derive` for refusals."""
        self.check_derive(source, holder, rights, name)
        return self.insert(holder, source.object_id, source.type, rights, name, source, source.end)

    def revoke(self, capability: Capability, *, keep: bool = True) -> list[Capability]:
        """Remove all that was derived from ``capability``, and itself unless ``keep``."""
        return self._forget(capability.subtree()[int(keep) :])

    def drop_object(self, object_id: int) -> list[Capability]:
        """Remove every capability to an object, which has ended."""
        return self._forget(list(self._objects.pop(object_id, ())))

    def _forget(self, gone: list[Capability]) -> list[Capability]:
        for entry in gone:
            del self._tables[entry.holder][entry.selector]
            self._names[entry.holder].pop(entry.name, None)
            self._objects.get(entry.object_id, {}).pop(entry, None)
            if entry.parent is not None:
                entry.parent.children.pop(entry, None)
        return gone
