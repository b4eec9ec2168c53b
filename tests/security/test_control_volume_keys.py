"""Keys of volumes: with their user only; in no log, event, answer, export of rows, or clear text."""

import asyncio
import base64
import os
import stat
import subprocess

import pytest

from supercloud.control.documents import VolumeDocument, load
from supercloud.control.store import SqliteStore
from supercloud.trust.wrapping import VolumeKeys
from supercloud.wire.volumes import Seal, VolumeOpen, VolumeSpec
from support.control import environment
from support.control_process import Process

VOLUMES = [{"name": "data", "size": "64MiB"}]
STORED = [environment("web", volumes=[{"name": "data", "path": "/data"}])]


@pytest.fixture
def process(tmp_path):
    made = Process(tmp_path)
    yield made
    made.stop()


async def _document(process):
    store = await SqliteStore.open(process.state / "state.db")
    try:
        row = await store.get("volume/test/data")
        return load(VolumeDocument, row.key, row.value)
    finally:
        await store.close()


async def _life(process):
    """Everything that may be done with a volume; all that the API answered, as text."""
    said = []
    process.start()
    async with process.client() as client:

        async def ask(method, path, body=None):
            _, answer = await client.ask(method, path, body)
            said.append(repr(answer))

        volume = "/v1/uclouds/test/volumes/data"
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        for path in ("/v1/volumes", volume, "/v1/uclouds/test/environments/web", "/v1/uclouds",
                     "/v1/openapi.json", "/v1/doctor"):  # fmt: skip
            await ask("GET", path)
        await ask("POST", "/v1/uclouds/test/rotate-key")
        await ask("POST", f"{volume}/snapshot", {"snapshot": "one"})
        await ask("POST", f"{volume}/accept", {"root": "00"})
        await ask("GET", "/v1/volumes")
        async with client.http.get("http://x/v1/events") as answer:
            said.append(await answer.text())
        await client.ask("POST", "/v1/uclouds/test/down")
        await client.until(None)
        await ask("GET", "/v1/volumes")
    process.stop()
    return "\n".join(said)


def _forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret)]


async def test_keys_are_nowhere_but_in_their_own_file(process):
    said = await _life(process)
    keys = VolumeKeys.ensure(str(process.state / "trust"), "test")
    document = await _document(process)
    data_key = keys.unwrap(document.wrapped_key)
    own = process.state / "trust" / "test" / "volumes.keys"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    wrapping = [bytes.fromhex(line) for line in own.read_text().split()]
    assert len(wrapping) == 1  # the old one went with the rotation
    secrets = [form for key in (data_key, *wrapping) for form in _forms(key)]
    # The wrapped key is no secret, and yet nobody's business.
    assert document.wrapped_key.partition(":")[2] not in said
    assert not [s for s in secrets if s in said.encode()]
    found = [
        str(path)
        for path in process.directory.rglob("*")
        if path.is_file() and path != own and any(s in path.read_bytes() for s in secrets)
    ]
    assert found == []


async def test_its_arguments_and_environment_hold_no_key(process):
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        keys = VolumeKeys.ensure(str(process.state / "trust"), "test")
        secrets = [
            s
            for line in (process.state / "trust/test/volumes.keys").read_text().split()
            for s in _forms(bytes.fromhex(line))
        ]
        for name in ("cmdline", "environ"):
            with open(f"/proc/{process.process.pid}/{name}", "rb") as file:
                text = file.read()
            assert not [s for s in secrets if s in text]
        assert keys.current


def test_a_request_to_open_does_not_show_its_key():
    key = base64.b64encode(os.urandom(32)).decode()
    spec = VolumeSpec(name="v", size_bytes=1 << 20)
    asked = VolumeOpen(spec=spec, key_base64=key, seal=Seal())
    assert key not in repr(asked)
    assert key not in f"{asked}"


async def test_an_export_carries_the_keys_and_what_is_kept_is_used_elsewhere(process, tmp_path):
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        await client.ask("POST", "/v1/uclouds/test/down")
        await client.until(None)
    process.stop()
    file, other = tmp_path / "export.tar", Process(process.directory)
    done = subprocess.run([*process.argv(), "--export", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    moved = process.state.rename(tmp_path / "old")
    adopt = [*other.argv(), "--adopt", str(file)]
    done = subprocess.run(adopt, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((other.state / "trust/test/volumes.keys").stat().st_mode) == 0o600
    (moved / "providers").rename(other.state / "providers")  # the pretended world itself
    other.start()
    try:
        async with other.client() as client:
            (row,) = await client.get("/v1/volumes")
            assert row["state"] == "kept"
            await client.up(STORED, volumes=VOLUMES)
            await client.until("ready")
            (row,) = await client.get("/v1/volumes")
            assert (row["state"], row["used_by"]) == ("attached", ["web"])
    finally:
        other.stop()


async def test_an_old_export_is_a_rollback_of_the_owner_and_opens_nothing_newer_wrongly(
    process, tmp_path
):
    """Adopting last week's state: the device is ahead of it, which is no attack, and opens."""
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        await client.ask("POST", "/v1/uclouds/test/down")
        await client.until(None)
    process.stop()
    file = tmp_path / "export.tar"
    subprocess.run([*process.argv(), "--export", str(file)], check=True, capture_output=True)
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        await client.ask("POST", "/v1/uclouds/test/volumes/data/snapshot", {"snapshot": "x"})
        await client.ask("POST", "/v1/uclouds/test/down")
        await client.until(None)
    process.stop()
    moved = process.state.rename(tmp_path / "newer")
    subprocess.run([*process.argv(), "--adopt", str(file)], check=True, capture_output=True)
    (moved / "providers").rename(process.state / "providers")
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        shown = await client.get("/v1/uclouds/test/volumes/data")
        assert shown["snapshots"] == ["x"]


async def test_a_lost_trust_directory_is_said_and_nothing_is_made_anew(process):
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        await client.until("ready")
        await client.ask("POST", "/v1/uclouds/test/down")
        await client.until(None)
    process.stop()
    (process.state / "trust" / "test" / "volumes.keys").unlink()
    process.start()
    async with process.client() as client:
        await client.up(STORED, volumes=VOLUMES)
        async with asyncio.timeout(20):
            while not (view := await client.get("/v1/uclouds/test"))["error"]:
                await asyncio.sleep(0.05)
        assert "wrapping key" in view["error"]["message"]
        assert "trust directory" in view["error"]["hint"]
        assert (await client.get("/v1/volumes"))[0]["state"] in ("kept", "opening")
