"""Idle memory (PSS) of all parts, after a minute without work, against what is promised.

Run as root. Keeper, core, the provider's components and one user's domain with its platform running;
the control plane; the agent inside a platform.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]


from up import BODY

from support.platform import booted
from support.slots import vm_slots
from support.stack import Stack, stack

MIB = 1 << 20
HOST_MIB, CONTROL_MIB, AGENT_MIB = 120, 80, 40
# A machine's own processes are no part of the host's idle memory: they come with each platform.
OF_A_PLATFORM = ("vmm:", "link:", "uplink-net:")


def pss_mib(pid: int | str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(pid)


def name_of(pid: int) -> str:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    for entry in environment:
        if entry.startswith(b"SUPERCLOUD_DOMAIN="):
            return entry.partition(b"=")[2].decode()
    return "keeper or core"


def host_rows(made: Stack) -> list[tuple[str, float]]:
    pids = made.hosts["here"].processes()
    rows = [(name_of(pid), pss_mib(pid)) for pid in pids]
    return sorted(row for row in rows if not row[0].startswith(OF_A_PLATFORM))


async def agent_mib(idle_s: float) -> float:
    with tempfile.TemporaryDirectory() as directory:
        async with booted(Path(directory)) as platform:
            await platform.session()
            await asyncio.sleep(idle_s)
            found = await platform.shell(
                "for p in /proc/[0-9]*; do grep -q agent $p/cmdline 2>/dev/null && "
                "awk '/^Pss:/{print $2}' $p/smaps_rollup; done"
            )
            return sum(int(line) for line in found.split()) / 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--idle", type=float, default=60.0, help="seconds before it is measured")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with vm_slots(), stack(ROOT / "build" / "images") as made:
        made.enrol("hello", "here")
        made.cli("up", made.manifest("hello", BODY.format(build=ROOT / "build" / "examples")))
        time.sleep(given.idle)
        rows = host_rows(made)
        assert made.control is not None
        control = pss_mib(made.control.pid)
    agent = asyncio.run(agent_mib(given.idle))
    host = sum(mib for _, mib in rows)
    totals = [
        ("host", host, HOST_MIB),
        ("control plane", control, CONTROL_MIB),
        ("agent", agent, AGENT_MIB),
    ]
    if given.json:
        print(json.dumps({"parts": rows, "totals": totals}, indent=2))
    else:
        for name, mib in rows:
            print(f"  {name:40} {mib:7.1f} MiB")
        for name, mib, limit in totals:
            print(f"{name:42} {mib:7.1f} MiB  at most {limit}")
    return int(any(mib > limit for _, mib, limit in totals))


if __name__ == "__main__":
    sys.exit(main())
