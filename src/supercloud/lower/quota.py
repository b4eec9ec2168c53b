"""A user's quota as limits of a scheduling context, and back.

The quota is what the user asked for: memory of guests, disk, machines. The processes around a
guest (QEMU's own memory, the monitor, passt) and the user's services come on top, so that a quota
of 4 GiB holds guests of 4 GiB; the figures here are what the domains of ``isolation.kinds`` are
allowed. The domains of services are there, if not running, as long as the user's own domain is.
"""

from typing import Final

from supercloud.isolation import kinds
from supercloud.model.capability import Limits
from supercloud.wire.quota import Quota

MIB = 1 << 20
USER_OWN_MEMORY_BYTES = 160 * MIB
USER_OWN_PIDS = 48
VMM_OVERHEAD_BYTES = 384 * MIB
"""QEMU, its translation cache (128 MiB), the page cache of its disks, and the monitor."""
VMM_PIDS = 160
LINK_MEMORY_BYTES = 64 * MIB
LINK_PIDS = 16
DOMAINS_PER_VM = 2
SERVICES: Final = {name: Limits(**figures) for name, figures in kinds.SERVICES.items()}
SIZES: Final = (
    Quota(),
    Quota(memory_bytes=2 << 30, disk_bytes=16 << 30, vms=2),
    Quota(memory_bytes=1 << 30, disk_bytes=8 << 30, vms=1),
)
"""With room for a template beside platforms, with little, and with none: one platform."""
_BASE_MEMORY_BYTES = USER_OWN_MEMORY_BYTES + sum(each.memory_bytes for each in SERVICES.values())
_BASE_PIDS = USER_OWN_PIDS + sum(each.pids for each in SERVICES.values())


def fitting(memory_bytes: int, disk_bytes: int) -> Quota:
    """The quota of who is enrolled without one, where so much of the host is left.

    The largest of ``SIZES`` that takes at most half of it, so that there is as much for others.
    """
    for size in SIZES[:-1]:
        limits = to_limits(size)
        if limits.memory_bytes <= memory_bytes // 2 and limits.disk_bytes <= disk_bytes // 2:
            return size
    return SIZES[-1]


def to_limits(quota: Quota) -> Limits:
    """Limits of the user's scheduling context."""
    around = VMM_OVERHEAD_BYTES + LINK_MEMORY_BYTES
    return Limits(
        cpu_permille=quota.cpu_permille,
        memory_bytes=_BASE_MEMORY_BYTES + quota.memory_bytes + quota.vms * around,
        pids=_BASE_PIDS + quota.vms * (VMM_PIDS + LINK_PIDS),
        domains=len(SERVICES) + DOMAINS_PER_VM * quota.vms,
        disk_bytes=quota.disk_bytes,
    )


def from_limits(limits: Limits) -> Quota:
    """The quota that ``to_limits`` made the limits of."""
    vms = (limits.domains - len(SERVICES)) // DOMAINS_PER_VM
    around = _BASE_MEMORY_BYTES + vms * (VMM_OVERHEAD_BYTES + LINK_MEMORY_BYTES)
    return Quota(
        cpu_permille=limits.cpu_permille,
        memory_bytes=limits.memory_bytes - around,
        disk_bytes=limits.disk_bytes,
        vms=vms,
    )


def vmm_limits(memory_bytes: int, cpus: int) -> Limits:
    """Limits of one machine's domain, its memory included."""
    return Limits(
        cpu_weight=100 * cpus,
        memory_bytes=memory_bytes + VMM_OVERHEAD_BYTES,
        pids=VMM_PIDS,
    )


def link_limits() -> Limits:
    """Limits of a machine's link domain."""
    return Limits(memory_bytes=LINK_MEMORY_BYTES, pids=LINK_PIDS)


def used(booked_memory_bytes: int, booked_domains: int, booked_disk_bytes: int) -> dict[str, int]:
    """What is used of a quota, from what is booked on the user's scheduling context.

    A machine that is just being made counts as soon as its first domain is there.
    """
    vms = max(0, -(-(booked_domains - len(SERVICES)) // DOMAINS_PER_VM))
    around = vms * (VMM_OVERHEAD_BYTES + LINK_MEMORY_BYTES)
    guests = max(0, booked_memory_bytes - _BASE_MEMORY_BYTES - around)
    return {"memory_bytes": guests, "disk_bytes": booked_disk_bytes, "vms": vms}
