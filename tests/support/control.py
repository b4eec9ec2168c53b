"""A control plane that can be killed at any effect, over a pretended world that outlives it."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from supercloud.control.app import ControlPlane
from supercloud.control.controllers.plane import Pace
from supercloud.control.effects import Seam
from supercloud.control.images import Converted
from supercloud.control.service import Manifest
from supercloud.control.store import SqliteStore
from supercloud.wire.messages import Process
from support import oci

QUICK = Pace(
    observe_s=0.05,
    lost_grace_s=0.2,
    lost_observe_s=0.1,
    boot_timeout_s=10.0,
    shutdown_timeout_s=2.0,
    settle_s=0.002,
    apply_gap_s=0.01,
    sweep_s=0.2,
    recreate_first_s=0.02,
    recreate_longest_s=0.1,
    seal_s=0.05,
    release_s=0.01,
    checkpoint_retry_s=0.02,
    collect_s=0.02,
    lease_s=0.05,
    lease_valid_s=0.5,
    rejoin_s=0.1,
    failover_s=0.2,
    template_ask_s=0.01,
    template_wait_s=0.05,
    template_look_s=0.5,
)
CONVERGES_S = 20.0


class Kill(Seam):
    """Lets effects pass until the ``at``-th (from 1), dies before or after it, and stays dead."""

    def __init__(self, at: int = 0, *, after: bool = False) -> None:
        self.at, self.after = at, after
        self.seen: list[str] = []
        self.dead = asyncio.Event()

    async def __call__(self, what: str, act: Callable[[], Awaitable[Any]]) -> Any:
        if self.dead.is_set():
            await asyncio.Future()
        self.seen.append(what)
        mine = len(self.seen) == self.at
        if mine and not self.after:
            await self._die()
        result = await act()
        if mine and self.after:
            await self._die()
        if self.dead.is_set():  # it happened, and nobody was there any more to see it
            await asyncio.Future()
        return result

    async def _die(self) -> None:
        self.dead.set()
        await asyncio.Future()


def write_images(directory: Path) -> None:
    """A VM's image and two container images, real enough to be converted."""
    (directory / "vm").mkdir(parents=True)
    (directory / "vm" / "kernel").write_bytes(b"kernel")
    (directory / "vm" / "initrd").write_bytes(b"initrd")
    for name in ("web", "web2"):
        layer = oci.layer(oci.file("serve", name.encode()))
        oci.Layout(directory / name, [layer], {"Cmd": ["/serve"]}).write()


def convert(reference: str) -> Converted:
    """What a conversion gives; in the process, for speed: its process is tested elsewhere."""
    path = Path(reference.removeprefix("oci:")) / "index.json"
    data = path.read_bytes()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Converted(digest, str(path), len(data), Process(argv=["/serve"]))


def environment(name: str, **more: Any) -> dict[str, Any]:
    """One environment of a manifest."""
    return {"name": name, "kind": "container", "image": "oci:web", "ports": [80]} | more


def manifest_of(
    directory: Path,
    environments: list[dict[str, Any]],
    *,
    name: str = "test",
    options: dict[str, str] | None = None,
    **more: Any,
) -> Manifest:
    """A manifest (JSON is YAML) with one fake provider."""
    body = {
        "apiVersion": "supercloud.dev/v1",
        "kind": "UCloud",
        "name": name,
        "providers": [{"name": "fake", "kind": "fake", "options": options or {"hosts": "3"}}],
        "environments": environments,
    } | more
    text = msgspec.json.encode(body).decode()
    return Manifest(manifest=text, file="test.yaml", directory=str(directory))


@dataclass
class World:
    """A directory with images and the state of control planes that come and go."""

    directory: Path
    pace: Pace = QUICK
    seam: Kill = field(default_factory=Kill)
    app: ControlPlane | None = None
    store: SqliteStore | None = None

    def __post_init__(self) -> None:
        if not (self.directory / "vm").exists():
            write_images(self.directory)

    async def start(self, seam: Kill | None = None) -> ControlPlane:
        """A control plane over what is there."""
        self.seam = seam or Kill()
        state = self.directory / "state"
        state.mkdir(exist_ok=True)
        self.store = await SqliteStore.open(state / "state.db")
        self.app = ControlPlane(
            self.store,
            state,
            self.directory / "cache",
            seam=self.seam,
            pace=self.pace,
            convert_image=convert,
        )
        await self.app.start()
        return self.app

    async def stop(self) -> None:
        """The end of it, in peace or, after a kill, with nothing done any more."""
        if self.app is not None and self.store is not None:
            await self.app.stop()
            await self.store.close()
        self.app = self.store = None

    # -- what to wait for

    async def until(self, true: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait for it, or for the kill; raise when neither comes."""
        async with asyncio.timeout(CONVERGES_S):
            while not self.seam.dead.is_set():
                if await true():
                    return
                await asyncio.sleep(0.005)
        if not self.seam.dead.is_set():
            raise AssertionError(f"never came: {what}")

    async def ready(self, name: str = "test") -> None:
        """Everything is as wished, and nothing more is going on."""

        async def true() -> bool:
            assert self.app is not None
            view = {view.name: view for view in await self.app.service.uclouds()}.get(name)
            if view is None or view.state != "ready":
                return False
            platforms = {item.state for item in view.platforms}
            return platforms <= {"ready"} and {i.state for i in view.environments} <= {"serving"}

        await self.until(true, f"{name} is ready")

    async def gone(self) -> None:
        """No U-Cloud is left."""

        async def true() -> bool:
            assert self.app is not None
            return not await self.app.service.uclouds()

        await self.until(true, "all is gone")

    # -- what there is in the pretended world

    def creations(self) -> list[str]:
        """The platforms that were ever made, by name, in order."""
        lines = []
        for path in sorted(self.directory.glob("state/providers/*/*/creations.jsonl")):
            lines += [msgspec.json.decode(line)["name"] for line in path.read_bytes().splitlines()]
        return lines

    def volume_creations(self) -> list[str]:
        """The volumes that were ever made, by name, in order."""
        lines = []
        for path in sorted(self.directory.glob("state/providers/*/*/volumes/creations.jsonl")):
            lines += [msgspec.json.decode(line)["name"] for line in path.read_bytes().splitlines()]
        return lines

    def volumes(self) -> dict[str, dict[str, Any]]:
        """The volumes that are there now, up or not."""
        found = {}
        for path in self.directory.glob("state/providers/*/*/volumes/*.json"):
            found[path.stem] = msgspec.json.decode(path.read_bytes())
        return found

    def platforms(self) -> dict[str, dict[str, Any]]:
        """The platforms that are there now."""
        found = {}
        for path in self.directory.glob("state/providers/*/*/*.json"):
            found[path.stem] = msgspec.json.decode(path.read_bytes())
        return found
