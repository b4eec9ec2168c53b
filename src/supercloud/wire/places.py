"""Numbers that both ends of a wire go by; for who needs no messages."""

from typing import Final

VOLUME_SLOTS: Final = 8
"""A platform takes so many volumes: free PCIe root ports, which are there from its start."""

DEPOSIT_BYTES: Final = 32 << 20
"""The end of a platform's scratch disk: there its host lays down files that its agent asks for."""

OBJECTS_PORT: Final = 9000
"""Where EEs find their U-Cloud's object store, at their gateway's address."""

OBJECTS_LINK_PORT: Final = 7445
"""Where their platform finds it, at the rendezvous' address of its link NIC."""


def deposit_at(disk_bytes: int) -> int:
    """Where that room begins on a scratch disk; 0: on one so small there is none."""
    return disk_bytes - DEPOSIT_BYTES if disk_bytes >= 8 * DEPOSIT_BYTES else 0
