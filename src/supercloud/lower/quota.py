"""A user's quota as limits of a scheduling context, and back.

The quota is what the user asked for: memory of guests, disk, machines. The processes around a
guest (QEMU's own memory, the monitor, passt) come on top, so that a quota of 4 GiB holds guests of
4 GiB; the figures here are what the domains of ``isolation.kinds`` are allowed.
"""

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


def to_limits(quota: Quota) -> Limits:
    """Limits of the user's scheduling context."""
    around = VMM_OVERHEAD_BYTES + LINK_MEMORY_BYTES
    return Limits(
        cpu_permille=quota.cpu_permille,
        memory_bytes=USER_OWN_MEMORY_BYTES + quota.memory_bytes + quota.vms * around,
        pids=USER_OWN_PIDS + quota.vms * (VMM_PIDS + LINK_PIDS),
        domains=DOMAINS_PER_VM * quota.vms,
        disk_bytes=quota.disk_bytes,
    )


def from_limits(limits: Limits) -> Quota:
    """The quota that ``to_limits`` made the limits of."""
    vms = limits.domains // DOMAINS_PER_VM
    around = USER_OWN_MEMORY_BYTES + vms * (VMM_OVERHEAD_BYTES + LINK_MEMORY_BYTES)
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
    vms = -(-booked_domains // DOMAINS_PER_VM)
    around = vms * (VMM_OVERHEAD_BYTES + LINK_MEMORY_BYTES)
    guests = max(0, booked_memory_bytes - USER_OWN_MEMORY_BYTES - around)
    return {"memory_bytes": guests, "disk_bytes": booked_disk_bytes, "vms": vms}
