"""Checkpoints on a host, by the host wire."""

from typing import Final

from supercloud.model.errors import NotFound
from supercloud.providers.lower_layer.volumes import Ask
from supercloud.wire.checkpoints import (
    CheckpointCollect,
    CheckpointCollected,
    CheckpointTake,
    CheckpointTaken,
    CheckpointVerified,
    RestoreFrom,
)

TAKE_TIMEOUT_S: Final = 3600.0
COLLECT_TIMEOUT_S: Final = 600.0
VERIFY_TIMEOUT_S: Final = 600.0


class HostCheckpoints:
    """Implements ``providers.base.Checkpoints`` for the one host of an entry."""

    def __init__(self, host: str, ask: Ask) -> None:
        self._host, self._ask = host, ask

    async def take(self, host: str, asked: CheckpointTake) -> CheckpointTaken:
        """One of a platform."""
        self._check(host)
        taken: CheckpointTaken = await self._ask("platform.checkpoint", asked, TAKE_TIMEOUT_S)
        return taken

    async def collect(self, host: str, asked: CheckpointCollect) -> CheckpointCollected:
        """Remove what is not to be kept."""
        self._check(host)
        done: CheckpointCollected = await self._ask("checkpoint.collect", asked, COLLECT_TIMEOUT_S)
        return done

    async def verify(self, host: str, asked: RestoreFrom) -> CheckpointVerified:
        """Read all of one."""
        self._check(host)
        done: CheckpointVerified = await self._ask("checkpoint.verify", asked, VERIFY_TIMEOUT_S)
        return done

    def _check(self, host: str) -> None:
        if host != self._host:
            raise NotFound(f"{self._host} has no host {host}")
