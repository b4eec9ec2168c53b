"""Numbers that both ends of a wire go by; for who needs no messages."""

from typing import Final

VOLUME_SLOTS: Final = 8
"""A platform takes so many volumes: free PCIe root ports, which are there from its start."""

OBJECTS_PORT: Final = 9000
"""Where EEs find their U-Cloud's object store, at their gateway's address."""

OBJECTS_LINK_PORT: Final = 7445
"""Where their platform finds it, at the rendezvous' address of its link NIC."""
