"""What this machine can do for the control plane, and how to fix what is missing."""

from supercloud.control.service import Service
from supercloud.wire.api import Check


async def examine(_service: Service) -> list[Check]:
    """All checks."""
    return []
