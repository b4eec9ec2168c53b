"""The agent in a booted platform, driven through the real hub: containers, VMs, names, crashes."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from supercloud.model.errors import NotFound, Unsupported
from supercloud.wire.messages import (
    Blob,
    EnvironmentSpec,
    Exec,
    ImageRef,
    Logs,
    PortMap,
    Process,
)
from support.platform import BOOT_SECTOR, FIRST_PORT, Platform, blob, booted, machine, nic, web

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300, func_only=True),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    async with booted(tmp_path_factory.mktemp("platform")) as made:
        yield made


def script(platform: Platform, text: str, name: str = "job", **changes: object) -> EnvironmentSpec:
    """A container that runs a shell script."""
    values = {
        "name": name, "uid": f"{name}-{platform.generation}", "ports": [], "nics": [nic(30)],
        "process": Process(argv=["/bin/sh", "-c", text]),
    }  # fmt: skip
    return web(platform, **{**values, **changes})


async def logs(platform: Platform, name: str, **more: object) -> bytes:
    session = await platform.session()
    out = b""
    async with session.logs(Logs(name=name, **more)) as stream:
        async for chunk in stream.chunks():
            out += chunk
    return out


async def test_container_and_vm_serve_and_say_so(platform: Platform) -> None:
    await platform.apply(web(platform), machine(platform))
    container = await platform.until("web", "serving")
    assert (container.engine, container.restarts, container.exit_status) == ("crun", 0, None)
    assert container.pid > 0
    assert container.memory_bytes > 0
    assert b"hello from container web" in await platform.http(FIRST_PORT)
    vm = await platform.until("machine", "serving")
    assert vm.engine == "qemu/kvm", "the image's kernel and QEMU's TCG nest"
    assert b"hello from vm machine" in await platform.http(FIRST_PORT + 1)


async def test_names_lead_from_one_ee_to_the_other(platform: Platform) -> None:
    status, out = await platform.execute("web", "wget", "-q", "-O", "-", "http://machine:8080/")
    assert (status, out) == (0, b"hello from vm machine\n")
    status, out = await platform.execute(
        "web", "wget", "-q", "-O", "-", "http://machine.demo.supercloud.internal:8080/"
    )
    assert (status, out) == (0, b"hello from vm machine\n")


async def test_exec_carries_input_output_errors_and_status(platform: Platform) -> None:
    program = ["sh", "-c", "cat; echo bad >&2; exit 7"]
    async with (await platform.session()).exec(Exec(name="web", argv=program)) as stream:
        await stream.write(b"x" * 300_000)
        stream.signal(eof=True)
        out = errors = b""
        while (item := await stream.read()) is not None:
            if isinstance(item, bytes):
                out += item
            else:
                errors += base64.b64decode(item["stderr"])
    assert stream.trailer == {"exit_status": 7}
    assert (len(out), errors) == (300_000, b"bad\n")


async def test_exec_gives_a_real_terminal(platform: Platform) -> None:
    asked = Exec(name="web", argv=["sh"], tty=True, rows=33, columns=99)
    async with (await platform.session()).exec(asked) as stream:
        await stream.write(b"busybox stty size; busybox tty\n")
        seen = await read_until(stream, b"/dev/pts/")
        assert b"33 99" in seen
        stream.signal(resize=[44, 111])
        await stream.write(b"busybox stty size\n")
        await read_until(stream, b"44 111")
        await stream.write(b"sleep 100\n")

        async def sleeps() -> bool:
            return b"sleep 100" in (await platform.execute("web", "ps"))[1]

        await eventually(sleeps)
        await stream.write(b"\x03")  # interrupts the sleep, not the shell
        await stream.write(b"exit 5\n")
        async for _ in stream.chunks():
            pass
    assert stream.trailer == {"exit_status": 5}


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.1)


async def new_session(platform: Platform, old: object) -> None:
    async def is_new() -> bool:
        return platform.link.hub.sessions.get(platform.name) not in (None, old)

    try:
        await eventually(is_new)
    except TimeoutError:
        pytest.fail(f"the agent did not come back:\n{platform.console[-2500:]}")


async def read_until(stream: object, what: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(60):
        while what not in seen:
            item = await stream.read()
            assert item is not None, seen
            seen += item if isinstance(item, bytes) else b""
    return seen


async def test_exec_signal_and_hang_up_end_the_program(platform: Platform) -> None:
    session = await platform.session()
    async with session.exec(Exec(name="web", argv=["sleep", "1000"])) as stream:
        stream.signal(signal="TERM")
        async for _ in stream.chunks():
            pass
    assert stream.trailer == {"exit_status": 143}
    async with session.exec(Exec(name="web", argv=["sleep", "2000"])):

        async def has_begun() -> bool:
            return "sleep 2000" in await platform.shell("ps")

        await eventually(has_begun)

    async def has_ended() -> bool:
        return not await has_begun()

    await eventually(has_ended)


async def test_exec_refusals(platform: Platform) -> None:
    session = await platform.session()
    with pytest.raises(NotFound):
        async with session.exec(Exec(name="nobody", argv=["true"])):
            pass
    with pytest.raises(Unsupported):
        async with session.exec(Exec(name="machine", argv=["true"])):
            pass
    status, _ = await platform.execute("web", "/no/such/program")
    assert status != 0


async def test_console_is_the_serial_port_both_ways(platform: Platform) -> None:
    async with (await platform.session()).console("machine") as stream:
        await stream.write(b"\n")
        await stream.write(b"echo on-$((6*7))-console\n")
        await read_until(stream, b"on-42-console")


async def test_agent_crash_kills_no_ee_and_the_next_agent_adopts_them(platform: Platform) -> None:
    before = {name: (await platform.status(name)).pid for name in ("web", "machine")}
    old = platform.link.hub.sessions[platform.name]
    await platform.shell(f"kill -9 {await platform.agent_pid()}")
    await new_session(platform, old)
    for name, pid in before.items():
        status = await platform.until(name, "serving")
        assert (status.pid, status.restarts) == (pid, 0)
    assert b"hello" in await platform.http(FIRST_PORT)
    assert b"hello" in await platform.http(FIRST_PORT + 1)
    async with (await platform.session()).console("machine") as stream:
        await stream.write(b"echo still-$((6*7))\n")
        await read_until(stream, b"still-42")


async def test_exit_while_the_agent_is_away_is_not_lost(platform: Platform) -> None:
    text = "trap 'exit 9' TERM; echo ready; sleep 1000 & wait"
    await platform.apply(script(platform, text, restart="never"))
    running = await platform.until("job", "running")

    async def is_ready() -> bool:
        return b"ready" in await logs(platform, "job")

    await eventually(is_ready)
    agent = await platform.agent_pid()
    await platform.shell(f"kill -9 {agent}; kill -TERM {running.pid}")
    ended = await platform.until("job", "exited")
    assert (ended.exit_status, ended.restarts) == (9, 0)
    # and it stays so over the next agent's life, for the policy is never
    old = await platform.session()
    await platform.shell(f"kill -9 {await platform.agent_pid()}")
    await new_session(platform, old)
    await asyncio.sleep(0.5)
    again = await platform.status("job")
    assert (again.state, again.exit_status, again.restarts) == ("exited", 9, 0)


async def test_ees_go_on_while_the_control_plane_is_away(platform: Platform) -> None:
    await platform.apply(web(platform, uid="web-2"))
    before = await platform.until("web", "serving")
    await platform.link.hub.close()
    assert b"hello" in await platform.http(FIRST_PORT)
    await platform.session()
    assert (await platform.until("web", "serving")).pid == before.pid


async def test_restart_policies(platform: Platform) -> None:
    await platform.apply(
        script(platform, "exit 3", "fails", restart="on-failure", nics=[nic(31)]),
        script(platform, "exit 0", "done", restart="on-failure", nics=[nic(32)]),
        script(platform, "sleep 0.3", "loops", restart="always", nics=[nic(33)]),
    )
    done = await platform.until("done", "exited")

    async def have_restarted() -> bool:
        found = [await platform.status(name) for name in ("fails", "loops")]
        return all(status.restarts >= 2 for status in found)

    await eventually(have_restarted)
    assert (done.exit_status, (await platform.status("done")).restarts) == (0, 0)


async def test_restart_on_demand(platform: Platform) -> None:
    await platform.apply(web(platform, uid="web-3"))
    before = await platform.until("web", "serving")
    await (await platform.session()).restart("web")
    after = await platform.until("web", "serving", restarts=1)
    assert after.pid != before.pid


async def test_logs_are_kept_followed_and_bounded(platform: Platform) -> None:
    text = "echo out; echo err >&2; i=0; while sleep 0.2; do i=$((i+1)); echo line $i; done"
    await platform.apply(script(platform, text, uid="log-1"))
    await platform.until("job", "running")
    async with (await platform.session()).logs(Logs(name="job", follow=True)) as stream:
        seen = await read_until(stream, b"line 4")
    assert seen.startswith(b"out\nerr\nline 1\n")
    assert (await logs(platform, "job", tail=1)).startswith(b"line ")
    flood = (
        "busybox yes 0123456789012345678901234567890123456789 | busybox head -c 7000000; sleep 99"
    )
    await platform.apply(script(platform, flood, uid="log-2"))
    await platform.until("job", "running")

    async def has_rotated() -> bool:
        return "output.1" in await platform.shell("ls /var/lib/supercloud/ee/log-2/log")

    await eventually(has_rotated)
    assert 2_000_000 < len(await logs(platform, "job")) <= 5_000_000


async def test_memory_limit_is_enforced_and_told(platform: Platform) -> None:
    hog = "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done"
    spec = script(platform, hog, uid="hog-1", memory_bytes=16 << 20, restart="never")
    await platform.apply(spec)
    ended = await platform.until("job", "exited")
    assert ended.exit_status in (2, 137)
    assert "out of memory" in ended.reason or ended.exit_status == 2


async def test_vm_boots_from_raw_and_qcow2_disks_and_keeps_what_it_writes(
    platform: Platform, tmp_path: Path
) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    qcow2 = tmp_path / "disk.qcow2"
    await convert_disk(raw, qcow2)
    paths = platform.link.owner.paths
    specs = [
        machine(
            platform, name=kind, uid=f"disk-{kind}", nics=[nic(number)], ports=[],
            memory_bytes=32 << 20, image=ImageRef(format=kind, blobs={"disk": blob(paths, path)}),
        )
        for number, (kind, path) in enumerate((("raw", raw), ("qcow2", qcow2)), 40)
    ]  # fmt: skip
    await platform.apply(*specs)
    for kind in ("raw", "qcow2"):
        await platform.until(kind, "running")
        async with (await platform.session()).console(kind) as stream:
            await read_until(stream, b"disk boots")


async def test_vm_from_kernel_and_initrd_as_blobs_of_their_own(platform: Platform) -> None:
    await platform.apply(machine(platform, packed=False, uid="loose-1"))
    await platform.until("machine", "serving", uid="loose-1")
    assert b"hello from vm machine" in await platform.http(FIRST_PORT + 1)


async def convert_disk(source: Path, target: Path) -> None:
    from supercloud.upper.platform.image.tools import ToolTree

    tool = ToolTree().argv("qemu-img")
    process = await asyncio.create_subprocess_exec(
        *tool, "convert", "-O", "qcow2", str(source), str(target)
    )
    assert await process.wait() == 0


async def test_what_cannot_run_fails_with_its_reason_and_recovers(
    platform: Platform, tmp_path: Path
) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"no erofs" * 1000)
    paths = platform.link.owner.paths
    good = web(platform, name="good", uid="good-1", nics=[nic(50)])
    missing = Blob(digest="sha256:" + "0" * 64, size_bytes=5)
    wrong = Blob(digest="sha256:" + "1" * 64, size_bytes=junk.stat().st_size)
    paths[wrong.digest] = junk
    reasons = {
        "missing": (missing, "no blob"),
        "wrong": (wrong, "another hash"),
        "junk": (blob(paths, junk), "no erofs"),
    }
    specs = [
        web(platform, name=name, uid=f"bad-{name}", nics=[nic(number)], ports=[],
            image=ImageRef(format="erofs", blobs={"root": root}))
        for number, (name, (root, _)) in enumerate(reasons.items(), 51)
    ]  # fmt: skip
    nothing = script(platform, "", "nothing", uid="bad-argv", nics=[nic(60)],
                     process=Process(argv=["/no/such/program"]))  # fmt: skip
    await platform.apply(good, *specs, nothing)
    await platform.until("good", "serving")
    for name, (_, reason) in reasons.items():
        assert reason in (await platform.until(name, "failed")).reason
    assert "/no/such/program" in (await platform.until("nothing", "failed")).reason
    await platform.apply(
        good, script(platform, "sleep 100", "nothing", uid="bad-argv-2", nics=[nic(60)])
    )
    await platform.until("nothing", "running")
    await platform.until("missing", "gone")


async def test_ee_made_anew_under_the_same_name_and_address(platform: Platform) -> None:
    await platform.apply(web(platform, uid="anew-1"))
    await platform.until("web", "serving")
    await platform.execute("web", "sh", "-c", "echo mine > /tmp/mine")
    await platform.apply(web(platform, uid="anew-2"))
    await platform.until("web", "serving", uid="anew-2", timeout_s=60)
    status, _ = await platform.execute("web", "cat", "/tmp/mine")
    assert status != 0, "the new one has a layer of its own"
    assert b"hello" in await platform.http(FIRST_PORT)


async def test_published_port_moves_without_a_restart(platform: Platform) -> None:
    spec = web(platform, uid="move-1")
    await platform.apply(spec)
    pid = (await platform.until("web", "serving", uid="move-1")).pid
    await platform.apply(
        web(platform, uid="move-1", ports=[PortMap(port=8080, host_port=FIRST_PORT + 2)])
    )

    async def has_moved() -> bool:
        with contextlib.suppress(OSError):
            return b"hello" in await platform.http(FIRST_PORT + 2)
        return False

    await eventually(has_moved)
    assert (await platform.status("web")).pid == pid


async def test_agent_is_small(platform: Platform) -> None:
    agent = await platform.agent_pid()
    out = await platform.shell(f"grep -h ^Pss: /proc/1/smaps_rollup /proc/{agent}/smaps_rollup")
    pss_kib = sum(int(line.split()[1]) for line in out.splitlines())
    assert pss_kib <= 40 << 10, (
        f"{pss_kib} KiB: process 1 and the agent, which has run all the above"
    )


async def test_an_empty_set_leaves_nothing_behind(platform: Platform) -> None:
    await platform.apply()

    async def is_empty() -> bool:
        return not (await (await platform.session()).list()).environments

    await eventually(is_empty)
    assert "/run/supercloud" in await platform.shell("ls -d /run/supercloud"), "the shell works"
    left = "ls /run/supercloud/ee /run/supercloud/crun /var/lib/supercloud/ee; ls -d /sys/fs/cgroup/ee/*/"

    async def is_quiet() -> bool:
        return "dnsmasq" not in await platform.shell("ps")

    await eventually(is_quiet)
    out = await platform.shell(
        f"{left}; grep -c -e nsfs -e rootfs -e crun /proc/mounts; ip -o link; ps; ip netns"
    )
    assert "web" not in out
    for word in ("ve", "tp", "ee0"):
        assert f" {word}" not in out, out
    assert "qemu-system" not in out
    assert "httpd" not in out


async def test_shutdown_powers_the_platform_off(platform: Platform) -> None:
    await platform.apply(web(platform, uid="last-1"))
    await platform.until("web", "serving", uid="last-1")
    await (await platform.session()).shutdown()
    assert platform.process is not None
    assert await asyncio.wait_for(platform.process.wait(), 120) == 0
