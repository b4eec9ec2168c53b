"""The uplink driver's records where the core is a step ahead of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.client import Core as RealCore
from supercloud.lower.provider.uplink import UplinkDriver
from supercloud.model.errors import NotFound
from supercloud.wire.portal import Request


class Core:
    """Knows a domain when it is looked up; by the time it is to be destroyed it has ended."""

    destroy_named = RealCore.destroy_named

    def __init__(self) -> None:
        self.asked: list[str] = []

    def lookup(self, name: str) -> Any:
        self.asked.append(name)
        return SimpleNamespace(selector=9)

    def destroy(self, _selector: int) -> None:
        raise NotFound("no such capability")


@pytest.mark.parametrize("how", ["deleted", "forgotten"])
def test_ports_are_given_back_though_their_passt_has_just_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    settings = {"address": "127.0.0.1", "first_port": 7000, "last_port": 7009, "dial": "any"}
    settings["guest"] = {}
    monkeypatch.setenv("SUPERCLOUD_UPLINK", json.dumps(settings))
    held = tmp_path / "ranges.json"
    held.write_text(json.dumps({"u/p": [7000, 4], "v/p": [7004, 2]}))
    core: Any = Core()
    driver = UplinkDriver(core, str(tmp_path))
    if how == "deleted":
        driver.delete(Request("user:u", "uplink.delete", {"platform": "p"}))
    else:
        driver.lost("user:u")  # a domain that ended is no user that was removed
        assert "u/p" in driver._ranges.held
        driver.forget(Request("multiplexing", "user.forget", {"user": "u"}))
    assert json.loads(held.read_text()) == {"v/p": [7004, 2]}
    assert core.asked == ["uplink-net:u:p"]
