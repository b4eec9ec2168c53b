"""The user domain's platforms over pretended drivers: what a machine's monitor may bring about."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.lower.user_domain.records import Record
from supercloud.wire.messages import PlatformSpec

FACTS: dict[str, Any] = {
    "images": ["sha256:" + "1" * 64], "accelerator": "tcg", "runtime_sha256": "2" * 64,
    "kernel": "6.18",
}  # fmt: skip
SPEC = PlatformSpec(
    name="p", image=FACTS["images"][0], cpus=1, memory_bytes=512 << 20, scratch_bytes=1 << 30,
    config_base64="", ports=4,
)  # fmt: skip


@pytest.fixture
def platforms(tmp_path: Path) -> Platforms:
    hub: Any = SimpleNamespace(core=None, join=lambda *_: None)
    made = Platforms(hub, "u", FACTS, Feed("u", "host/t"), str(tmp_path / "platforms"))
    made._records.put(Record(SPEC, "tcg", 0.0, state="running"))
    return made


@pytest.mark.parametrize("word", ["deleting", "gone", "creating", "nonsense", None, ["failed"]])
async def test_a_monitor_cannot_say_that_its_platform_is_deleted(
    platforms: Platforms, word: Any
) -> None:
    for state in (word, "gone"):
        platforms._told("machine.state", {"platform": "p", "state": state}, [])
    await asyncio.sleep(0)
    (status,) = platforms.statuses()
    assert status.state == "running"
