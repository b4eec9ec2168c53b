"""What a VM's pages are counted as tracked since, when a checkpoint of it comes to nothing."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.model.errors import Temporary
from supercloud.upper.platform.agent import frozen_machine, paths
from supercloud.upper.platform.agent.processes import Watched
from supercloud.wire.checkpoints import CheckpointTake, StoreAccess

STORE = StoreAccess(
    secret="00" * 32, server_name="s", ca_pem="", access_key="", secret_key="", region="local"
)


class Qemu:
    async def call(self, command: str, *_: object, **__: object) -> dict[str, Any]:
        return {"status": "running"} if command == "query-status" else {}


class Saver:
    """It has begun to write a new base when the store goes away."""

    async def ask(self, kind: str, request: Any, *_: object) -> Any:
        assert (kind, request.base) == ("take", "old")
        raise Temporary("the store is gone")


async def test_no_increment_lies_over_the_old_base_once_a_new_one_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beginning counts all pages as clean, so that what was written before would be lost."""

    @contextlib.asynccontextmanager
    async def saver(**_: object) -> AsyncIterator[Saver]:
        yield Saver()

    monkeypatch.setattr(frozen_machine, "saver", saver)
    monkeypatch.setattr(frozen_machine, "fingerprint", lambda _: {})
    monkeypatch.setattr(paths, "CHECKPOINTS", str(tmp_path / "checkpoints"))
    places = SimpleNamespace(run=str(tmp_path))
    spec = SimpleNamespace(uid="u1", name="vm", volumes=[])
    machine: Any = SimpleNamespace(spec=spec, qmp=Qemu(), places=places, has_disk=False)
    services: Any = SimpleNamespace(ucloud="u")
    process = Watched(os.getpid(), 0.0)
    try:
        frozen_machine._keep_base(machine, process, "old")
        wanted = CheckpointTake(name="vm", uid="u1", store=STORE)
        with pytest.raises(Temporary, match="the store is gone"):
            await frozen_machine.take(machine, wanted, services, process)
        assert frozen_machine._base(machine, process) == ""
    finally:
        process.close()
