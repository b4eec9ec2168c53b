"""The domains of a user's services, over a pretended core that tells of a death late."""

from types import SimpleNamespace
from typing import Any

from supercloud.lower.user_domain.services import Services
from supercloud.model.errors import NotFound
from supercloud.wire.frames import DomainState


class Core:
    """Domains by name with their states; ``untold`` are the dead that nobody has heard of."""

    def __init__(self) -> None:
        self.states: dict[str, DomainState] = {}
        self.untold: list[str] = []

    def lookup(self, name: str) -> Any:
        if name not in self.states:
            raise NotFound(name)
        return SimpleNamespace(selector=name)

    def create_domain(self, _kind: str, name: str, _limits: Any) -> Any:
        self.states[name] = DomainState.CREATED
        return SimpleNamespace(selector=name)

    def state(self, name: Any) -> Any:
        return SimpleNamespace(state=self.states[name])

    def start(self, name: Any) -> None:
        self.states[name] = DomainState.RUNNING

    def destroy(self, name: Any) -> None:
        del self.states[name]

    def create_channel(self, *_: object) -> None: ...

    def dies(self, name: str) -> None:
        del self.states[name]
        self.untold.append(name)


class Hub:
    def __init__(self) -> None:
        self.core, self.ended = Core(), lambda _name: None

    def join(self, name: str, _told: Any) -> str:
        return name

    def leave(self, _name: str) -> None: ...

    def drain(self) -> None:
        untold, self.core.untold = self.core.untold, []
        for name in untold:
            self.ended(name)


def test_a_service_that_was_started_anew_is_not_ended_by_the_late_news_of_the_old_one() -> None:
    hub: Any = Hub()
    services, ended = Services(hub, "u"), []
    hub.ended = lambda name: (ended.append(name), services.end("block"))
    services.start("block")
    hub.core.dies("block:u")
    services.start("block")
    assert services.is_running("block")
    hub.drain()
    assert services.is_running("block")
    assert ended == ["block:u"]
