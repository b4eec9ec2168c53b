"""What checkpoints are sealed under: with their user, and with who takes them; nowhere else."""

import asyncio
import base64
import os
import stat
import subprocess

import pytest

from supercloud.control.documents import StoreDocument, load
from supercloud.control.store import SqliteStore
from supercloud.trust.wrapping import VolumeKeys
from supercloud.wire.checkpoints import (
    CheckpointCollect,
    CheckpointTake,
    Head,
    RestoreFrom,
    StoreAccess,
)
from supercloud.wire.host import PlatformSpec
from support.control import environment
from support.control_process import Process

WISH = [environment("web", checkpoint={})]
KEPT = "/v1/uclouds/test/checkpoints/web"


@pytest.fixture
def process(tmp_path):
    made = Process(tmp_path)
    yield made
    made.stop()


async def _store(process):
    store = await SqliteStore.open(process.state / "state.db")
    try:
        row = await store.get("objects/test/objects")
        return load(StoreDocument, row.key, row.value)
    finally:
        await store.close()


async def _take(client):
    asked = (await client.ask("POST", f"{KEPT}/take"))[1]
    async with asyncio.timeout(30):
        while True:
            view = await client.get(KEPT)
            if view["task"]["id"] == asked["id"] and view["task"]["done"]:
                return view
            await asyncio.sleep(0.02)


async def _restore(client):
    await client.ask("POST", f"{KEPT}/restore", {})
    async with asyncio.timeout(30):
        while (await client.get(KEPT))["restoring"]:
            await asyncio.sleep(0.02)
    await client.until("ready")


def _forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret)]


async def test_the_secret_is_nowhere_in_clear_at_the_control_plane(process):
    process.start()
    said = []
    async with process.client() as client:
        await client.up(WISH)
        await client.until("ready")
        said.append(repr(await _take(client)))
        await _restore(client)
        await client.ask("POST", "/v1/uclouds/test/rotate-key")
        await _take(client)
        paths = ("/v1/checkpoints", KEPT, "/v1/uclouds/test/environments/web", "/v1/uclouds",
                     "/v1/buckets", "/v1/openapi.json", "/v1/environments")  # fmt: skip
        said += [repr(await client.ask("GET", path)) for path in paths]
        wrong = ({"checkpoint": 99}, {"to": "nowhere"}, {"checkpoint": -1})
        said += [repr(await client.ask("POST", f"{KEPT}/restore", body)) for body in wrong]
        async with client.http.get("http://x/v1/events") as answer:
            said.append(await answer.text())
        for name in ("cmdline", "environ"):
            with open(f"/proc/{process.process.pid}/{name}", "rb") as file:
                said.append(file.read().decode("latin-1"))
    process.stop()
    document = await _store(process)
    keys = VolumeKeys.ensure(str(process.state / "trust"), "test")
    secret = keys.unwrap(document.wrapped_secret)
    assert len(secret) == 32
    access = [keys.unwrap(item.wrapped_secret) for item in document.access.values()]
    assert access
    secrets = _forms(secret) + access
    shown = "\n".join(said).encode()
    assert not [form for form in secrets if form in shown]
    # What the pretended platforms were told is theirs; all else is the control plane's.
    own = [path for path in process.directory.rglob("*") if "providers" not in path.parts]
    assert len([path for path in own if path.is_file()]) > 5
    found = [
        str(path)
        for path in own
        if path.is_file() and any(form in path.read_bytes() for form in secrets)
    ]
    assert found == []
    stored = list(process.state.glob("providers/*/*/checkpoints/*.json"))
    assert stored
    assert not any(form in path.read_bytes() for path in stored for form in secrets)


async def test_messages_with_the_secret_do_not_show_it():
    secret, key = os.urandom(32).hex(), os.urandom(20).hex()
    store = StoreAccess(
        secret=secret, server_name="objects.example", ca_pem="", access_key="SC1", secret_key=key,
        region="r",
    )  # fmt: skip
    head = Head(sequence=1, root="0" * 64)
    restore = RestoreFrom(ee="web", store=store, head=head)
    for message in (
        store,
        restore,
        CheckpointTake(name="web", uid="e1", store=store, head=head),
        CheckpointCollect(store=store),
        PlatformSpec(name="p", image="sha256:" + "0" * 64, restore=restore),
    ):
        assert secret not in repr(message)
        assert key not in f"{message}"


async def test_a_state_that_is_taken_elsewhere_restores_what_was_taken_before(process, tmp_path):
    process.start()
    async with process.client() as client:
        await client.up(WISH)
        await client.until("ready")
        await _take(client)
        await client.ask("POST", "/v1/uclouds/test/down")
        await client.until(None)
    process.stop()
    file, other = tmp_path / "export.tar", Process(process.directory)
    done = subprocess.run([*process.argv(), "--export", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    moved = process.state.rename(tmp_path / "old")
    done = subprocess.run([*other.argv(), "--adopt", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (moved / "providers").rename(other.state / "providers")  # the pretended world itself
    other.start()
    try:
        async with other.client() as client:
            (row,) = await client.get("/v1/checkpoints")
            assert (row["state"], row["kept"]) == ("kept", 1)
            await client.up(WISH)
            await client.until("ready")
            await _restore(client)
            assert (await _take(client))["last"] == 2
    finally:
        other.stop()


async def test_one_u_cloud_does_not_reach_the_checkpoints_of_another(process):
    process.start()
    async with process.client() as client:
        await client.up(WISH)
        await client.until("ready")
        await _take(client)
        status, _ = await client.ask("GET", "/v1/uclouds/other/checkpoints/web")
        assert status == 404
        status, _ = await client.ask("POST", "/v1/uclouds/other/checkpoints/web/restore", {})
        assert status in (404, 409)
        status, _ = await client.ask("POST", "/v1/uclouds/other/forget-checkpoints")
        assert (await client.get(KEPT))["kept"] == 1
