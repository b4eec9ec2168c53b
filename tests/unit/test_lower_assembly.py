"""A platform's parts over pretended drivers: what is left when one of them is refused."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.user_domain.assembly import Assembly
from supercloud.model.errors import NoResources, NotFound
from supercloud.wire.host import PlatformSpec

SPEC = PlatformSpec(
    name="p", image="sha256:" + "1" * 64, cpus=1, memory_bytes=512 << 20, scratch_bytes=1 << 30,
    config_base64="", ports=4,
)  # fmt: skip


class Driver:
    """Takes its time; ``refuses`` a method, and says to ``said`` what it did, when it is done."""

    def __init__(self, said: list[str], refuses: str = "") -> None:
        self._said, self._refuses = said, refuses
        self.given: list[int] = []

    async def call(self, method: str, *_: Any, **__: Any) -> Any:
        await asyncio.sleep(0.01)
        self._said.append(method)
        if method == self._refuses:
            raise NoResources(f"no room for {method}")
        if method == "disk.create":
            self.given.append(os.open("/dev/null", os.O_RDONLY))
        return SimpleNamespace(descriptors=self.given[-1:])

    async def result(self, method: str, *_: Any) -> Any:
        await self.call(method)
        guest = {"address": "10.0.2.15/24", "gateway": "10.0.2.2", "resolvers": []}
        return {"domain": "uplink", "address": "127.0.0.1", "first_port": 40_000, "guest": guest}


def absent(_name: str) -> None:
    raise NotFound("nothing of that name")


@pytest.mark.parametrize("refused", ["domain", "disk.create", "uplink.create"])
async def test_what_is_refused_waits_for_what_was_asked_for_and_gives_it_back(refused: str) -> None:
    said = list[str]()
    driver = Driver(said, refused)

    def create_domain(*_: Any) -> Any:
        if refused == "domain":
            raise NoResources("no room for domain")
        return SimpleNamespace(selector=1, scheduling=2)

    core: Any = SimpleNamespace(
        lookup=absent, create_domain=create_domain, destroy_named=lambda _: None
    )
    hub: Any = SimpleNamespace(core=core, join=lambda *_: driver, leave=lambda *_: None)
    made = Assembly(hub, "u", "tcg", told=lambda *_: None)
    made._make_machine = lambda *_: create_domain()  # type: ignore[method-assign]
    core.create_channel = core.start = lambda *_: None
    with pytest.raises(NoResources, match=f"no room for {refused}"):
        await made.make(SPEC, b"")
    begun = [said.index(method) for method in ("disk.create", "uplink.create")]
    ended = [said.index(method) for method in ("disk.delete", "uplink.delete")]
    assert max(begun) < min(ended)
    for descriptor in driver.given:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
