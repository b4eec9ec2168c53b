"""Process 1 of a service's domain: makes the service that it is told, and serves it on ``control``.

``python -m supercloud.lower.service NAME``. The service knows nothing of the core: it gets calls
with descriptors, and tells its user's domain what happens over the same channel.
"""

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.model.errors import NotFound, SupercloudError
from supercloud.services.base import Make, Service
from supercloud.wire import portal

CHANNEL: Final = "control"
# name -> the module that has ``make``
SERVICES: Final[Mapping[str, str]] = {
    "checkpoint": "supercloud.services.checkpoint.service",
    "block": "supercloud.services.block.service",
    "objects": "supercloud.services.objects.service",
    "protection": "supercloud.services.protection.service",
    "replication": "supercloud.services.replication.service",
}

log = logging.getLogger("supercloud.lower.service")


class Launcher(Component):
    """Serves one service to whoever holds the other end of ``control``."""

    def __init__(self, core: Core, make: Make) -> None:
        super().__init__(core)
        self._service: Service = make(self.reactor, self._tell)
        self.serve(CHANNEL, self._service.handlers())

    def _tell(self, method: str, parameters: Mapping[str, Any]) -> None:
        channel = self.channels.get(CHANNEL)
        if channel is None:
            return
        try:
            portal.send(channel, {"m": method, "p": dict(parameters)})
        except (OSError, SupercloudError) as error:  # it asks when it is there again
            log.info("the user's domain was not told: %s", error)


def main(name: str) -> None:
    """Run the service of that name until the host goes down."""
    os.umask(0o077)
    if name not in SERVICES:
        raise NotFound(f"no service {name!r}", hint=f"one of {', '.join(SERVICES)}")
    make: Make = importlib.import_module(SERVICES[name]).make
    Launcher(Core(), make).run()


if __name__ == "__main__":
    main(sys.argv[1])
