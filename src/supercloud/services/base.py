"""What every one of the user's services is, whoever launches it.

A service gets descriptors and calls, nothing else: on a Lower Layer host the core's launcher puts
it in a domain of its own and serves its handlers on channels (``lower.service``); inside a platform
of a legacy IaaS the same service is launched by our core there. It is single-threaded towards its
callers: one handler at a time, on the launcher's reactor.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from supercloud.wire.portal import Handler
from supercloud.wire.reactor import Reactor

Tell = Callable[[str, Mapping[str, Any]], None]
"""``tell(method, parameters)``: a notification to whoever controls the service; never blocks."""


class Service(Protocol):
    """One service, made with its launcher's reactor and its ``Tell``."""

    def handlers(self) -> Mapping[str, Handler]:
        """Method -> what serves it (see ``wire.portal``)."""

    def close(self) -> None:
        """Finish what was acknowledged; the process ends after that."""


Make = Callable[[Reactor, Tell], Service]
