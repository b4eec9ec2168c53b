"""A domain with a static payload against bubblewrap, same namespaces and filter; at most 1.5x.

From the request to the news of the payload's end: for the core that is CREATE_DOMAIN, START and
the DIED event, with the domain's groups, limits and grant log, which bubblewrap does not have.
"""

import argparse
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ab

from core_host import MIB, driver, host, kind
from supercloud.isolation import seccomp

CODE = bytes.fromhex("b83c00000031ff0f05")  # mov eax, 60; xor edi, edi; syscall: exit(0)
START = """
def once(kind):
    started = time.perf_counter()
    core.start(core.create_domain(kind, 'payload').selector)
    while not any(e.op == Event.DIED for e in core.events(5.0)): pass
    return (time.perf_counter() - started) * 1e3
def only_start(kind):
    d = core.create_domain(kind, 'payload').selector
    started = time.perf_counter()
    core.start(d)
    taken = (time.perf_counter() - started) * 1e3
    while not any(e.op == Event.DIED for e in core.events(5.0)): pass
    return taken
"""


def write_payload(path: Path) -> None:
    """The smallest static program: an ELF header, one segment, exit(0)."""
    base, head = 0x400000, 64 + 56
    size = head + len(CODE)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    elf = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    path.write_bytes(ident + elf + segment + CODE)
    path.chmod(0o755)


def bubblewrap(filter_path: str, payload: str) -> float:
    descriptor = os.open(filter_path, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    command = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    command += ["--unshare-uts", "--unshare-cgroup", "--uid", "20000000", "--gid", "20000000"]
    command += ["--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"]
    command += ["--symlink", "usr/lib64", "/lib64", "--tmpfs", "/tmp", "--tmpfs", "/run"]
    command += [
        "--ro-bind",
        payload,
        "/run/payload",
        "--dev",
        "/dev",
        "--new-session",
        "--cap-drop",
        "ALL",
    ]
    command += ["--seccomp", str(descriptor), "/run/payload"]
    # posix_spawn: no fork of this process's memory on bubblewrap's bill
    measure = ab.seconds(lambda: _spawn(command))
    try:
        return measure() * 1e3
    finally:
        os.close(descriptor)


def _spawn(command: list[str]) -> None:
    pid = os.posix_spawn("/usr/bin/bwrap", command, os.environ)
    assert os.waitpid(pid, 0)[1] == 0


def main() -> int:
    options = ab.arguments(rounds=60)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        write_payload(directory / "payload")
        (directory / "base.bpf").write_bytes(seccomp.compiled("base")[0])
        return compare(directory, options)


def compare(directory: Path, options: argparse.Namespace) -> int:
    path, payload = str(directory / "base.bpf"), str(directory / "payload")
    child = kind(
        argv=["/run/payload"],
        binds=[{"source": payload, "target": "/run/payload"}],
        limits={"memory_bytes": 16 * MIB, "pids": 4},
    )
    with host({"driver": driver(creates=["child"]), "child": child}) as made:
        one = made.consoles["one"]
        one(START)
        sides = [
            ab.Side("bubblewrap", lambda: bubblewrap(path, payload)),
            ab.Side("core, request to end", lambda: one("result = once('child')"), at_most=1.5),
            ab.Side("core, START alone", lambda: one("result = only_start('child')")),
        ]
        return ab.run("domain start", "ms", sides, options, warm_up=3)


if __name__ == "__main__":
    assert os.getuid() == 0, "needs uid 0"
    subprocess.run(["bwrap", "--version"], check=True, stdout=subprocess.DEVNULL)
    sys.exit(main())
