"""What machines start from, if not by their kernel: memory of a template or of a checkpoint."""

from dataclasses import dataclass

from supercloud.lower.client import Core
from supercloud.lower.names import domain_name
from supercloud.lower.user_domain import parts, templates
from supercloud.lower.user_domain.records import Record
from supercloud.model.capability import Rights
from supercloud.wire.host import PlatformSpec


@dataclass(frozen=True, slots=True)
class Origin:
    """What a machine starts from: memory objects of this domain. ``start`` is as in ``Machine``.

    ``rights`` are what the machine's domain has on the RAM: to seal it takes writing.
    """

    start: str
    ram: str
    state: str
    rights: Rights = parts.READ

    def lend(self, core: Core, vmm: int) -> None:
        """Let a machine's domain have it."""
        core.delegate(core.lookup(self.ram).selector, vmm, self.rights, "ram")
        core.delegate(core.lookup(self.state).selector, vmm, parts.READ, "state")


def restored_ram(platform: str) -> str:
    """The memory object with what a checkpoint had in its memory."""
    return domain_name("restored-ram", platform)


def restored_state(platform: str) -> str:
    """The one with its devices' state."""
    return domain_name("restored-state", platform)


def restored(platform: str) -> Origin:
    """A checkpoint that was read."""
    return Origin("restore", restored_ram(platform), restored_state(platform), parts.READ_WRITE)


def origin_of(record: Record) -> Origin | None:
    """What a platform's machine was, or is to be, started from; None: it boots."""
    if record.restored:
        return restored(record.spec.name)
    if record.template:
        key = record.template
        return Origin("clone", templates.ram_of(key), templates.state_of(key))
    return None


def whose(spec: PlatformSpec) -> str:
    """The checkpoint that a platform goes on from: of whom, and its sequence."""
    restore = spec.restore
    return f"{restore.ee}:{restore.sequence or restore.head.sequence}" if restore else ""
