"""What the core knows, as the outcome of its grant log: every change is a record, applied here.

A record is a flat dict with an ``op``; :meth:`State.apply` runs it, when it is made and again when
a new core reads the log. So a recovered core has the tables of the dead one by construction.
Nothing here touches a descriptor or a process; what a record takes out of the tables is collected
in :attr:`State.gone` for the broker to carry out.
"""

from collections import ChainMap
from dataclasses import dataclass, field
from typing import Any

from supercloud.lower.core.manifest import Kind, Manifest
from supercloud.model.capability import Capability, CapabilityGraph, Limits, ObjectType, Rights
from supercloud.model.refusals import Invalid, NoResources
from supercloud.wire.frames import DomainState

Record = dict[str, Any]
Values = tuple[int, ...]

MAX_INT = 1 << 62
SUMMED = Limits._fields[2:]
_DOMAIN, _CONTEXT = ObjectType.DOMAIN, ObjectType.SCHEDULING_CONTEXT
_SELF = Rights.CONNECT | Rights.GRANT
_WHOLE = Rights.USE | Rights.CONTROL
_OWN_CONTEXT = Rights.READ | Rights.CHARGE | Rights.GRANT
_MAKER = Rights.USE | Rights.READ | Rights.WRITE | Rights.GRANT | Rights.CONTROL


@dataclass(slots=True, eq=False)
class Context:
    """A scheduling context; ``own`` is kept for the processes of the domain itself."""

    id: int
    name: str
    parent: "Context | None"
    limits: Limits
    path: str
    own: Limits
    charges: dict[int, int] = field(default_factory=dict)  # disk bytes, by who booked them


@dataclass(slots=True, eq=False)
class Object:
    """Anything but a domain; ``descriptors`` are the core's, two for the ends of a portal."""

    id: int
    type: ObjectType
    name: str
    maker: "Domain | None"
    number: int = 0  # socket type of a portal, bytes of a memory, first value of a semaphore
    context: Context | None = None
    ends: tuple["Domain", ...] = ()
    sha256: str = ""
    descriptors: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Domain:
    """A protection domain and its one execution context; ``last`` is its last logged call."""

    id: int
    kind: Kind
    name: str
    parent: "Domain | None"
    context: Context
    slot: int
    state: DomainState = DomainState.CREATED
    numbers: Values = ()
    starts: int = 0
    wait_status: int = 0
    last: tuple[int, Values, str] = (0, (), "")
    purge: bool = False  # its private directory ends with it, and those of its children


def checked_limits(figures: Values) -> Limits:
    """The limits that a call asks for; Invalid when they make no sense."""
    weight, permille, *rest = figures
    sound = 1 <= weight <= 10000 and (not permille or 10 <= permille <= 1 << 20)
    if not sound or any(not 0 <= figure <= MAX_INT for figure in rest):
        raise Invalid("cpu_weight must be 1..10000, cpu_permille 0 or 10..2^20, the others 0..2^62")
    return Limits(*figures)


class State:
    """Domains, scheduling contexts, objects and the capability graph of one host."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.graph, self.next_id = manifest, CapabilityGraph(), 2
        self.root = Context(1, "host", None, manifest.limits, "", Limits())
        self.contexts = {1: self.root}
        self.domains: dict[int, Domain] = {}
        self.objects: dict[int, Object] = {}
        self.behind = ChainMap[int, Any](self.domains, self.contexts, self.objects)
        # what the last record took out of the tables
        self.gone: tuple[list[Domain], list[Object], list[Capability]] = [], [], []

    def apply(self, record: Record) -> Values:
        """Run a record, which must have been checked; the values that answer it."""
        self.gone = [], [], []
        values: Values = getattr(self, f"_do_{record['op']}")(record) or ()
        caller = self.domains.get(record.get("by", 0))
        if caller is not None:
            caller.last = (record["seq"], values, record.get("sha256", ""))
        return values

    def booked(self, context: Context) -> Values:
        """What is taken of its ``SUMMED`` limits: by itself, charges, children and objects."""
        taken = [(context.own.memory_bytes, context.own.pids, 0, sum(context.charges.values()))]
        children = [c.limits for c in self.contexts.values() if c.parent is context]
        taken += [(c.memory_bytes, c.pids, c.domains + 1, c.disk_bytes) for c in children]
        taken += [(o.number, 0, 0, 0) for o in self.objects.values() if o.context is context]
        return tuple(map(sum, zip(*taken, strict=True)))

    def check_left(self, context: Context, asked: Values, cpu_permille: int = 0) -> None:
        """NoResources unless this much of ``SUMMED`` is left; the cpu quota must be in its own."""
        for what, amount, booked in zip(SUMMED, asked, self.booked(context), strict=True):
            left = getattr(context.limits, what) - booked
            if amount > left:
                raise NoResources(f"{what}: {amount} asked, {context.name} has {left}")
        if context.limits.cpu_permille and cpu_permille > context.limits.cpu_permille:
            raise NoResources(f"cpu_permille: {context.name} has {context.limits.cpu_permille}")

    def _do_boot(self, r: Record) -> None:
        if r["manifest"] != self.manifest.sha256:
            raise Invalid("the grant log is of another manifest")

    def _do_domain(self, r: Record) -> Values:
        kind, parent = self.manifest.kinds[r["kind"]], self.domains.get(r["parent"])
        charged, limits, name = self.contexts[r["context"]], Limits(*r["limits"]), r["name"]
        path = f"{charged.path}/{name}.{r['id']}".lstrip("/")
        own = kind.own if kind.creates else Limits()
        context = Context(r["id"] + 1, name, charged, limits, path, own)
        domain = Domain(r["id"], kind, name, parent, context, r["slot"])
        self.domains[domain.id], self.contexts[context.id] = domain, context
        self.next_id = r["id"] + 2
        self.graph.open_table(domain.id)
        insert, of_domain, of_context = self.graph.insert, _DOMAIN, _CONTEXT
        insert(domain.id, domain.id, of_domain, _SELF, "self")
        insert(domain.id, context.id, of_context, _OWN_CONTEXT, "sched")
        if parent is None:
            return ()
        made = insert(parent.id, domain.id, of_domain, kind.creator_rights, name)
        rights = _OWN_CONTEXT | Rights.CONTROL
        at_parent = insert(parent.id, context.id, of_context, rights, f"sched:{name}")
        return made.selector, at_parent.selector

    def _do_start(self, r: Record) -> None:
        domain = self.domains[r["id"]]
        domain.state, domain.numbers = DomainState.RUNNING, tuple(r["numbers"])
        domain.starts, domain.last = domain.starts + 1, (0, (), "")

    def _do_stopped(self, r: Record) -> None:
        domain = self.domains[r["id"]]
        domain.state, domain.wait_status = DomainState(r["state"]), r["status"]
        for capability in self.graph.entries(domain.id):
            capability.taken = False  # its descriptors are gone with its process

    def _do_portal(self, r: Record) -> Values:
        whole = self.graph.get(r["by"], *self._do_object(r))
        self.objects[r["id"]].ends = self.domains[r["a"]], self.domains[r["b"]]
        what, insert = (r["id"], whole.type, Rights.USE), self.graph.insert
        in_a = insert(r["a"], *what, r["name_a"], whole, 0)
        in_b = insert(r["b"], *what, r["name_b"], whole, 1)
        return whole.selector, in_a.selector, in_b.selector

    def _do_object(self, r: Record) -> Values:
        """A new object, and its maker's capability to it (none for the manifest's own)."""
        maker, context = self.domains.get(r.get("by", 0)), self.contexts.get(r.get("context", 0))
        type_, name, size = ObjectType[r["op"].upper()], r.get("name", ""), r.get("number", 0)
        self.objects[r["id"]] = Object(r["id"], type_, name, maker, size, context)
        self.next_id = r["id"] + 1
        if maker is None:
            return ()
        rights = _WHOLE if type_ is ObjectType.PORTAL else _MAKER
        return (self.graph.insert(maker.id, r["id"], type_, rights, name).selector,)

    _do_memory = _do_semaphore = _do_device = _do_object

    def _do_seal(self, r: Record) -> None:
        self.objects[r["id"]].sha256 = r["sha256"]

    def _do_grant(self, r: Record) -> None:  # of the manifest, derived from nobody's
        self.graph.insert(r["to"], r["id"], ObjectType(r["type"]), Rights(r["rights"]), r["name"])

    def _do_delegate(self, r: Record) -> Values:
        source = self.graph.get(r["holder"], r["selector"])
        return (self.graph.derive(source, r["to"], Rights(r["rights"]), r["name"]).selector,)

    def _do_taken(self, r: Record) -> None:
        self.graph.get(r["holder"], r["selector"]).taken = True

    def _do_revoke(self, r: Record) -> Values:
        gone = self.graph.revoke(self.graph.get(r["holder"], r["selector"]))
        self._lose(gone)
        return (len(gone),)

    def _do_limits(self, r: Record) -> None:
        self.contexts[r["id"]].limits = Limits(*r["limits"])

    def _do_charge(self, r: Record) -> Values:
        context, by = self.contexts[r["id"]], r["by"]
        context.charges[by] = context.charges.get(by, 0) + r["bytes"]
        return (sum(context.charges.values()),)

    def _do_destroy(self, r: Record) -> None:
        if domain := self.domains.get(r["id"]):
            domain.purge = bool(r.get("purge"))
            self._end_domain(domain)
        else:
            self._end_object(self.objects[r["id"]])

    def _end_domain(self, domain: Domain) -> None:
        """Children first; then what it made, what is booked on it, and its table."""
        context = domain.context
        for other in list(self.domains.values()):
            its = other.parent is domain or other.context.parent is context
            if its and other.id in self.domains:
                other.purge = domain.purge
                self._end_domain(other)
        for made in list(self.objects.values()):
            its = domain in (made.maker, *made.ends) or made.context is context
            if its and made.id in self.objects:
                self._end_object(made)
        self._lose(self.graph.drop_object(domain.id) + self.graph.drop_object(context.id))
        self._lose(self.graph.close_table(domain.id))
        del self.contexts[context.id], self.domains[domain.id]
        self.gone[0].append(domain)

    def _end_object(self, ended: Object) -> None:
        del self.objects[ended.id]
        self._lose(self.graph.drop_object(ended.id))
        self.gone[1].append(ended)

    def _lose(self, capabilities: list[Capability]) -> None:
        """Note lost capabilities; a portal that lost one end is over for both."""
        self.gone[2].extend(capabilities)
        for capability in capabilities:
            if capability.type is ObjectType.PORTAL and capability.object_id in self.objects:
                self._end_object(self.objects[capability.object_id])
