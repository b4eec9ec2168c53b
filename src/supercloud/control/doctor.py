"""What only the control plane can say of its health; the machine's is looked at by the CLI."""

import asyncio
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import PlatformDocument, TemplateWish
from supercloud.control.store import Store
from supercloud.model.errors import SupercloudError
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import HostCapacity
from supercloud.wire.api import Check

LEAST_FREE_BYTES = 1 << 30
SLOW_COMMIT_MS = 50.0
PROBES = 5
PROVIDER_TIMEOUT_S = 10.0


async def examine(plane: Plane, places: Sequence[Path]) -> list[Check]:
    """All checks; ``places`` are the directories that it writes to."""
    disks = {path.stat().st_dev: path for path in places}
    checks = [_disk(path) for path in disks.values()]
    checks.append(await _commits(plane.state.store))
    for ucloud in await plane.state.uclouds():
        entries = {item.name: item for item in ucloud.providers.values()}
        checks += await asyncio.gather(
            *(_provider(plane, ucloud.name, entry) for entry in entries.values())
        )
        platforms = await plane.state.platforms(ucloud.name)
        checks += [_platform(plane, item) for item in platforms]
    for templates in await plane.state.all_templates():
        checks += [_template(templates.ucloud, wish) for wish in templates.wishes]
    return checks


def _template(ucloud: str, wish: TemplateWish) -> Check:
    """Without one, platforms boot: that is slower, and nothing lacks."""
    ready = f" with {len(wish.environments)} environments" if wish.environments else ""
    shape = f"{wish.cpus} cpus, {wish.memory_bytes >> 20} MiB{'' if wish.plain else ready}"
    reason = f" ({wish.reason})" if wish.reason else ""
    return Check(
        name=f"template {ucloud}/{wish.host}",
        ok=wish.state != "refused",
        found=f"{wish.state or 'not asked for yet'}: {shape}{reason}",
        fix="platforms boot instead; see the host's events for what it met",
    )


def _disk(path: Path) -> Check:
    free_bytes = shutil.disk_usage(path).free
    return Check(
        name=f"disk space ({path})",
        ok=free_bytes >= LEAST_FREE_BYTES,
        found=f"{free_bytes >> 20} MiB free",
        fix=f"make room: state and images want at least {LEAST_FREE_BYTES >> 20} MiB",
    )


async def _commits(store: Store) -> Check:
    """How long a change takes to reach the disk; a slow disk makes everything slow."""
    key, took_ms = "probe/doctor", []
    row = await store.get(key)
    version = row.version if row else 0
    for number in range(PROBES):
        begin = time.perf_counter()
        version = await store.put_if_version(key, str(number).encode(), version)
        took_ms.append((time.perf_counter() - begin) * 1000)
    await store.delete_if_version(key, version)
    median_ms = statistics.median(took_ms)
    return Check(
        name="state on disk",
        ok=median_ms <= SLOW_COMMIT_MS,
        found=f"a change is durable in {median_ms:.1f} ms",
        fix="put the state directory on a local disk (--state)",
    )


async def _provider(plane: Plane, ucloud: str, entry: Entry) -> Check:
    name = f"provider {ucloud}/{entry.name}"
    try:
        async with asyncio.timeout(PROVIDER_TIMEOUT_S):
            provider = plane.pool.get(ucloud, entry)
            hosts, features = await provider.hosts(), await provider.features()
    except TimeoutError:
        return Check(name=name, ok=False, found="no answer", fix=_start_it(entry))
    except SupercloudError as error:
        return Check(name=name, ok=False, found=str(error), fix=_start_it(entry))
    return Check(name=name, ok=bool(hosts), found=_shown(hosts, features), fix=_start_it(entry))


def _start_it(entry: Entry) -> str:
    if entry.kind == "lower_layer":
        return f"see that a host listens on {entry.endpoint} and has enrolled {entry.user}"
    return "see its `options` in the manifest"


def _shown(hosts: Sequence[HostCapacity], features: dict[str, str]) -> str:
    accelerators = sorted({host.accelerator or "unknown" for host in hosts})
    text = f"{len(hosts)} hosts, accelerator {', '.join(accelerators)}"
    why = features.get("kvm", "")
    return f"{text} ({why})" if why and "kvm" not in accelerators else text


def _platform(plane: Plane, platform: PlatformDocument) -> Check:
    connected = plane.agents.session(platform.ucloud, platform.name) is not None
    reason = f": {platform.reason}" if platform.reason else ""
    return Check(
        name=f"platform {platform.ucloud}/{platform.name}",
        ok=connected,
        found=f"{platform.state}, agent {'' if connected else 'not '}connected{reason}",
        fix="wait while it boots; then see `supercloud events` for what it meets",
    )
