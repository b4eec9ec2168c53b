"""What the core knows, as the outcome of its grant log: every change is a record, applied here.

A record is a flat dict with an ``op``; :meth:`State.apply` runs it, when it is made and again when
a new core reads the log. So a recovered core has the tables of the dead one by construction.
Nothing here touches a descriptor or a process; what a record takes out of the tables is collected
in :attr:`State.gone` for the broker to carry out.
"""

from dataclasses import dataclass, field
from typing import Any

from supercloud.lower.core.manifest import Kind, Manifest
from supercloud.model.capability import (
    ALL_RIGHTS,
    Capability,
    CapabilityGraph,
    Limits,
    ObjectType,
    Rights,
)
from supercloud.model.errors import Invalid, NoResources
from supercloud.wire.frames import DomainState

Record = dict[str, Any]
Values = tuple[int, ...]

SELF_RIGHTS = Rights.CONNECT | Rights.GRANT
OWN_CONTEXT_RIGHTS = Rights.READ | Rights.CHARGE | Rights.GRANT
CHILD_CONTEXT_RIGHTS = OWN_CONTEXT_RIGHTS | Rights.CONTROL
MAKER_RIGHTS = Rights.USE | Rights.READ | Rights.WRITE | Rights.GRANT | Rights.CONTROL


@dataclass(slots=True, eq=False)
class Context:
    """A scheduling context; ``booked`` is what its children and objects take of ``limits``."""

    id: int
    name: str
    parent: "Context | None"
    limits: Limits
    path: str
    booked: Limits = Limits(cpu_weight=0)  # noqa: RUF009  frozen
    charges: dict[int, int] = field(default_factory=dict)  # disk bytes, by who booked them

    def check(self, asked: Limits) -> None:
        """NoResources unless ``asked`` fits in what is left; the cpu quota in this one's."""
        for what in ("memory_bytes", "pids", "domains", "disk_bytes"):
            left = getattr(self.limits, what) - getattr(self.booked, what)
            if getattr(asked, what) > left:
                raise NoResources(f"{what}: {getattr(asked, what)} asked, {self.name} has {left}")
        if self.limits.cpu_permille and asked.cpu_permille > self.limits.cpu_permille:
            raise NoResources(f"cpu_permille: {self.name} has {self.limits.cpu_permille}")

    def book(self, more: Limits, sign: int = 1) -> None:
        """Add to (or take from) what is booked."""
        pairs = zip(self.booked.values(), more.values(), strict=True)
        _, _, *summed = (old + sign * new for old, new in pairs)
        self.booked = Limits(0, 0, *summed)


@dataclass(slots=True, eq=False)
class Object:
    """Anything but a domain; ``descriptors`` are the core's, two for the ends of a portal."""

    id: int
    type: ObjectType
    name: str
    maker: "Domain | None"
    context: Context | None = None
    size_bytes: int = 0  # of a memory object; the first value of a semaphore
    sha256: str = ""
    socket_type: int = 0
    ends: tuple["Domain", ...] = ()
    descriptors: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Domain:
    """A protection domain and its one execution context."""

    id: int
    kind: Kind
    name: str
    parent: "Domain | None"
    context: Context
    slot: int
    state: DomainState = DomainState.CREATED
    numbers: tuple[int, ...] = ()
    starts: int = 0
    wait_status: int = 0
    made: int = 0
    last: tuple[int, Values, str] = (0, (), "")

    @property
    def books(self) -> Limits:
        """What it takes of its parent context: its limits, and itself as one domain."""
        limits = self.context.limits
        return Limits(0, 0, limits.memory_bytes, limits.pids, limits.domains + 1, limits.disk_bytes)


@dataclass(slots=True)
class Gone:
    """What the last record took out of the tables; a domain's last selector at its parent."""

    domains: list[tuple[Domain, int, int]] = field(default_factory=list)
    objects: list[Object] = field(default_factory=list)
    capabilities: list[Capability] = field(default_factory=list)


class State:
    """Domains, scheduling contexts, objects and the capability graph of one host."""

    def __init__(self, manifest: Manifest) -> None:
        """An empty host with the manifest's limits."""
        self.manifest = manifest
        self.root = Context(1, "host", None, manifest.limits, "")
        self.contexts = {1: self.root}
        self.domains: dict[int, Domain] = {}
        self.objects: dict[int, Object] = {}
        self.graph = CapabilityGraph()
        self.next_id = 2
        self.gone = Gone()

    def apply(self, record: Record) -> Values:
        """Run a record, which must have been checked; the values that answer it."""
        values: Values = getattr(self, f"_do_{record['op']}")(record)
        caller = self.domains.get(record.get("by", 0))
        if caller is not None:
            caller.last = (record["seq"], values, record.get("sha256", ""))
        return values

    def take_gone(self) -> Gone:
        """What was taken out since the last call."""
        gone, self.gone = self.gone, Gone()
        return gone

    def domain_named(self, name: str) -> Domain | None:
        """The domain of that name; names are unique on a host."""
        return next((d for d in self.domains.values() if d.name == name), None)

    def own_limits(self, kind: Kind, limits: Limits) -> Limits:
        """What a domain's own processes may use of its context."""
        if not kind.creates:
            return limits
        return Limits(memory_bytes=kind.own.memory_bytes, pids=kind.own.pids)

    def _do_boot(self, record: Record) -> Values:
        if record["manifest"] != self.manifest.sha256:
            raise Invalid("the grant log is of another manifest")
        return ()

    def _do_domain(self, r: Record) -> Values:
        kind = self.manifest.kinds[r["kind"]]
        parent = self.domains.get(r["parent"])
        charged, limits = self.contexts[r["context"]], Limits(*r["limits"])
        path = f"{charged.path}/{r['name']}.{r['id']}".lstrip("/")
        context = Context(r["id"] + 1, r["name"], charged, limits, path)
        domain = Domain(r["id"], kind, r["name"], parent, context, r["slot"])
        charged.book(domain.books)
        if kind.creates:
            context.book(self.own_limits(kind, limits))
        self.domains[domain.id] = domain
        self.contexts[context.id] = context
        self.next_id = r["id"] + 2
        return self._domain_entries(domain)

    def _domain_entries(self, domain: Domain) -> Values:
        """Selectors 0 and 1 of its own table, and the two at its parent."""
        insert, name = self.graph.insert, domain.name
        types = ObjectType.DOMAIN, ObjectType.SCHEDULING_CONTEXT
        self.graph.open_table(domain.id)
        insert(domain.id, domain.id, types[0], SELF_RIGHTS, "self")
        insert(domain.id, domain.context.id, types[1], OWN_CONTEXT_RIGHTS, "sched")
        if domain.parent is None:
            return ()
        at, rights = domain.parent.id, domain.kind.creator_rights
        made = insert(at, domain.id, types[0], rights, name)
        context = insert(at, domain.context.id, types[1], CHILD_CONTEXT_RIGHTS, f"sched:{name}")
        return made.selector, context.selector

    def _do_start(self, r: Record) -> Values:
        domain = self.domains[r["id"]]
        domain.state = DomainState.RUNNING
        domain.numbers = tuple(r["numbers"])
        domain.starts += 1
        domain.last = (0, (), "")
        return ()

    def _do_stopped(self, r: Record) -> Values:
        """It ended, or could not start; its descriptors are gone with it."""
        domain = self.domains[r["id"]]
        domain.state = DomainState(r["state"])
        domain.wait_status = r["status"]
        for capability in self.graph.entries(domain.id):
            capability.taken = False
        return ()

    def _do_channel(self, r: Record) -> Values:
        a, b = self.domains[r["a"]], self.domains[r["b"]]
        portal = self._object(r, ObjectType.PORTAL, socket_type=r["type"], ends=(a, b))
        insert, whole = self.graph.insert, None
        if portal.maker is not None:
            rights = Rights.CONTROL | Rights.USE
            whole = insert(portal.maker.id, portal.id, portal.type, rights, "")
        ends = [
            insert(end.id, portal.id, portal.type, Rights.USE, r[name], whole, number)
            for number, (end, name) in enumerate(((a, "name_a"), (b, "name_b")))
        ]
        return (whole.selector if whole else 0, ends[0].selector, ends[1].selector)

    def _do_memory(self, r: Record) -> Values:
        context = self.contexts[r["context"]]
        context.book(Limits(0, 0, memory_bytes=r["bytes"]))
        memory = self._object(r, ObjectType.MEMORY, context=context, size_bytes=r["bytes"])
        return self._to_maker(memory, r["name"])

    def _do_seal(self, r: Record) -> Values:
        self.objects[r["id"]].sha256 = r["sha256"]
        return ()

    def _do_semaphore(self, r: Record) -> Values:
        made = self._object(r, ObjectType.SEMAPHORE, size_bytes=r["value"])
        return self._to_maker(made, r["name"])

    def _do_device(self, r: Record) -> Values:
        self._object(r, ObjectType.DEVICE)
        return ()

    def _object(self, r: Record, type_: ObjectType, **more: Any) -> Object:
        maker = self.domains.get(r["by"]) if "by" in r else None
        made = Object(r["id"], type_, r.get("name", ""), maker, **more)
        self.objects[made.id] = made
        self.next_id = made.id + 1
        if maker is not None:
            maker.made += 1
        return made

    def _to_maker(self, made: Object, name: str) -> Values:
        assert made.maker is not None  # noqa: S101  the broker makes these for domains only
        entry = self.graph.insert(made.maker.id, made.id, made.type, MAKER_RIGHTS, name)
        return (entry.selector,)

    def _do_grant(self, r: Record) -> Values:
        """A capability out of the manifest, derived from nobody's."""
        kind = ObjectType(r["type"])
        rights = Rights(r["rights"]) & ALL_RIGHTS
        return (self.graph.insert(r["to"], r["id"], kind, rights, r["name"]).selector,)

    def _do_delegate(self, r: Record) -> Values:
        source = self.graph.get(r["holder"], r["selector"])
        made = self.graph.derive(source, r["to"], Rights(r["rights"]), r["name"])
        return (made.selector,)

    def _do_taken(self, r: Record) -> Values:
        self.graph.get(r["holder"], r["selector"]).taken = True
        return ()

    def _do_revoke(self, r: Record) -> Values:
        gone = self.graph.revoke(self.graph.get(r["holder"], r["selector"]))
        return (self._lose(gone),)

    def _do_limits(self, r: Record) -> Values:
        context, limits = self.contexts[r["id"]], Limits(*r["limits"])
        if context.parent is not None:
            context.parent.book(context.limits, -1)
            context.parent.book(limits)
        context.limits = limits
        return ()

    def _do_charge(self, r: Record) -> Values:
        context = self.contexts[r["id"]]
        context.charges[r["by"]] = context.charges.get(r["by"], 0) + r["bytes"]
        context.book(Limits(0, 0, disk_bytes=r["bytes"]))
        return (context.booked.disk_bytes,)

    def _do_destroy(self, r: Record) -> Values:
        if r["id"] in self.domains:
            self._end_domain(self.domains[r["id"]])
        elif r["id"] in self.objects:
            self._end_object(self.objects[r["id"]])
        return ()

    def _end_domain(self, domain: Domain) -> None:
        """Children first; then what it made, what is charged to it, and its table."""
        for other in list(self.domains.values()):
            if other.id in self.domains and (
                other.parent is domain or other.context.parent is domain.context
            ):
                self._end_domain(other)
        for made in list(self.objects.values()):
            its = domain in (made.maker, *made.ends) or made.context is domain.context
            if its and made.id in self.objects:
                self._end_object(made)
        selectors = self._selectors_at_parent(domain)
        self._lose(self.graph.drop_object(domain.id))
        self._lose(self.graph.drop_object(domain.context.id))
        self._lose(self.graph.close_table(domain.id))
        if domain.context.parent is not None:
            domain.context.parent.book(domain.books, -1)
        del self.contexts[domain.context.id], self.domains[domain.id]
        self.gone.domains.append((domain, *selectors))

    def _selectors_at_parent(self, domain: Domain) -> tuple[int, int]:
        if domain.parent is None or domain.parent.id not in self.domains:
            return 0, 0
        found = [0, 0]
        for number, id_ in enumerate((domain.id, domain.context.id)):
            for capability in self.graph.of_object(id_):
                if capability.holder == domain.parent.id and capability.parent is None:
                    found[number] = capability.selector
        return found[0], found[1]

    def _end_object(self, ended: Object) -> None:
        del self.objects[ended.id]
        self._lose(self.graph.drop_object(ended.id))
        if ended.context is not None:
            ended.context.book(Limits(0, 0, memory_bytes=ended.size_bytes), -1)
        if ended.maker is not None:
            ended.maker.made -= 1
        self.gone.objects.append(ended)

    def _lose(self, capabilities: list[Capability]) -> int:
        """Note lost capabilities; a portal that lost one end is over for both."""
        self.gone.capabilities += capabilities
        for capability in capabilities:
            if capability.type is ObjectType.PORTAL and capability.object_id in self.objects:
                self._end_object(self.objects[capability.object_id])
        return len(capabilities)
