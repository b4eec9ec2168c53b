"""The control plane as a process: one at a time, killed at any moment, stopped in peace, small."""

import asyncio
import json
import os
import random
import stat
import subprocess
import time
from collections import Counter

import pytest

from supercloud.control.api.server import Server
from supercloud.control.controllers.plane import Pace
from supercloud.control.settings import parse
from support.control import World, environment
from support.control_process import Process

TWO = [environment("web", replicas=2), environment("db", kind="vm", image="vm", ports=[])]
SEED = int(os.environ.get("SUPERCLOUD_SEED", "7"))
ROUNDS = 25 if os.environ.get("SUPERCLOUD_LONG") else 4
SLOW = {"hosts": "3", "latency_ms": "15", "boot_ms": "60", "start_ms": "60"}


@pytest.fixture
def process(tmp_path):
    made = Process(tmp_path)
    yield made
    made.stop()


def platforms_of(process):
    return sorted(path.stem for path in process.state.glob("providers/*/*/*.json"))


def creations_of(process):
    names = []
    for path in process.state.glob("providers/*/*/creations.jsonl"):
        names += [json.loads(line)["name"] for line in path.read_text().splitlines()]
    return Counter(names)


async def test_a_second_one_on_the_same_state_is_refused(process):
    process.start()
    second = subprocess.run(process.argv(), capture_output=True, text=True, timeout=20)
    assert second.returncode == 5
    assert str(process.process.pid) in second.stderr
    async with process.client() as client:
        assert (await client.get("/v1/version"))["pid"] == process.process.pid


async def test_sigterm_ends_it_cleanly_and_a_new_one_goes_on(process):
    process.start()
    async with process.client() as client:
        await client.up(TWO)
        await client.until("ready")
        rows = await client.get("/v1/environments")
        following = await client.http.get("http://x/v1/events?follow=1")
        assert process.stop() == 0  # with the follower still there
        following.close()
    assert not process.socket.exists()
    process.start()
    async with process.client() as client:
        await client.until("ready")
        assert await client.get("/v1/environments") == rows
    assert set(creations_of(process).values()) == {1}
    assert not [line for line in process.log() if line["level"] in ("error", "critical")]


async def test_sigkill_at_any_moment_of_up_and_down_and_it_converges(process):
    """The real thing: a process killed by the kernel, over the pretended provider's files."""
    chance = random.Random(SEED)
    for _ in range(ROUNDS):
        process.start()
        async with process.client() as client:
            await client.up(TWO, options=SLOW)
            time.sleep(chance.uniform(0, 0.35))
            process.kill()
        process.start()
        async with process.client() as client:
            if not await client.get("/v1/uclouds"):
                await client.up(TWO, options=SLOW)
            await client.until("ready")
            assert len(platforms_of(process)) == 1
            await client.ask("POST", "/v1/uclouds/test/down")
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        process.start()
        async with process.client() as client:
            await client.until(None)
            assert platforms_of(process) == []
        assert process.stop() == 0
        assert max(creations_of(process).values()) <= _ + 1


async def test_a_dead_ones_socket_and_lock_do_not_stand_in_the_way(process):
    process.start()
    process.kill()
    assert process.socket.exists()
    process.start()
    async with process.client() as client:
        assert (await client.get("/v1/version"))["protocol"] == 1


def test_what_is_wrong_at_the_start_is_said_in_one_line(tmp_path):
    for wrong, status in ((["--listen", "nowhere"], 2), (["--socket", "/proc/no/api.sock"], 2)):
        process = Process(tmp_path)
        done = subprocess.run([*process.argv(), *wrong], capture_output=True, text=True, timeout=20)
        assert done.returncode == status, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


async def test_logs_are_json_lines_private_and_without_secrets(process):
    process.start()
    async with process.client() as client:
        await client.up([environment("web", env={"PASSWORD": "swordfish"})])
        await client.until("ready")
    assert stat.S_IMODE((process.state / "control.log").stat().st_mode) == 0o600
    text = (process.state / "control.log").read_text()
    assert "swordfish" not in text
    assert {"event", "level", "logger", "timestamp"} <= json.loads(text.splitlines()[0]).keys()
    tokens = [
        json.loads(path.read_text())["boot"]["token"]
        for path in process.state.glob("providers/*/*/*.json")
    ]
    assert tokens
    assert all(token not in text for token in tokens)
    assert all(token.encode() not in (process.state / "state.db").read_bytes() for token in tokens)


async def test_ps_of_500_environments_is_encoded_once(process, monkeypatch):
    """For as long as nothing changes, however often it is asked for; in our own process."""
    world = World(process.directory, pace=Pace())
    app = await world.start()
    server = Server(app, parse(process.argv()[3:], {}))
    await server.start()
    listed, environments = [], app.service.environments

    async def counted(ucloud=""):
        listed.append(ucloud)
        return await environments(ucloud)

    async def versions():
        rows, _ = await world.store.list("")
        return [(row.key, row.version) for row in rows]

    many = [
        environment(f"e{n}", kind="vm", image="vm", replicas=50, memory="16MiB") for n in range(10)
    ]
    options = {"hosts": "20", "memory_gib": "64", "cpus": "64"}
    size = {"memory": "8GiB", "ports": 64}
    async with process.client() as client:
        await client.up(many, options=options, platform=size)
        await client.until("ready", timeout_s=120)
        monkeypatch.setattr(app.service, "environments", counted)
        async with asyncio.timeout(60):
            before = None
            while before != (before := await versions()):
                listed.clear()
                bodies = [await client.get("/v1/environments") for _ in range(20)]
    assert len(bodies[-1]) == 500
    assert len(listed) <= 1
    await server.stop()
    await world.stop()


async def test_it_is_small_when_it_idles(process):
    """At most 80 MB PSS with a U-Cloud up, one container image converted, a client connected."""
    process.listen = "127.0.0.1:0"
    process.start()
    async with process.client() as client:
        await client.up(TWO)
        await client.until("ready")
        await client.get("/v1/environments")
        await client.get("/v1/doctor")
        assert process.pss_bytes() < 80e6


async def test_a_state_is_exported_adopted_elsewhere_and_carried_on(process, tmp_path):
    """The platforms stay where they are, and answer to the new control plane."""
    process.start()
    async with process.client() as client:
        await client.up(TWO)
        await client.until("ready")
        rows = await client.get("/v1/environments")
        ca = await client.get("/v1/ca")
    process.stop()
    file, other = tmp_path / "export.tar", Process(process.directory)
    done = subprocess.run([*process.argv(), "--export", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = subprocess.run([*process.argv(), "--export", str(file)], capture_output=True, text=True)
    assert (again.returncode, "there already" in again.stderr) == (4, True)
    moved = process.state.rename(tmp_path / "old")
    adopt = [*other.argv(), "--adopt", str(file)]
    done = subprocess.run(adopt, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (moved / "providers").rename(other.state / "providers")  # the pretended world itself
    other.start()
    try:
        async with other.client() as client:
            await client.until("ready")
            assert await client.get("/v1/environments") == rows
            assert await client.get("/v1/ca") == ca
    finally:
        other.stop()
    assert set(creations_of(other).values()) == {1}
    done = subprocess.run(adopt, capture_output=True, text=True)
    assert (done.returncode, "there is a state" in done.stderr) == (4, True)


@pytest.mark.parametrize("name", ["../evil", "trust/../../evil", "/etc/passwd", "trust/a/b/c/d"])
def test_a_hostile_export_is_refused(tmp_path, name):
    import io
    import tarfile

    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as tar:
        for member in ("rows.jsonl", "tokens.key", name):
            info = tarfile.TarInfo(member)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    process = Process(tmp_path)
    done = subprocess.run(
        [*process.argv(), "--adopt", str(file)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2, done.stderr
    assert not list(tmp_path.rglob("evil"))
    assert not (process.state / "state.db").exists()
