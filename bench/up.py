"""``supercloud up`` of the example with images built, to both EEs serving, against the direct way.

Ours: the command, through control plane, host, platform and agent; both sides boot the same image
on the same machine. Run as root; it takes a mount namespace of its own.
"""

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

from ab import Side, arguments, run
from direct.hello import prepared, wait_until_served

from support.slots import vm_slots
from support.stack import Stack, stack

AT_MOST = 1.2
BODY = """platform: {{cpus: 1, memory: 1GiB}}
environments:
  - {{name: web, kind: container, image: "oci:{build}/web", cpus: 0.5, memory: 64MiB, ports: [8080]}}
  - {{name: machine, kind: vm, image: "{build}/vm", memory: 128MiB, ports: [8080]}}
"""


def ours(made: Stack, manifest: str) -> float:
    """Seconds from the command to both URLs answering."""
    started = time.monotonic()
    view = json.loads(made.cli("up", "--json", manifest).stdout)
    wait_until_served([url for row in view["environments"] for url in row["urls"]])
    took_s = time.monotonic() - started
    made.cli("down", "hello")
    return took_s


def main() -> int:
    options = arguments(rounds=5)
    with vm_slots(), prepared() as direct, stack(ROOT / "build" / "images") as made:
        made.enrol("hello", "here")
        manifest = made.manifest("hello", BODY.format(build=ROOT / "build" / "examples"))
        sides = [
            Side("by hand: QEMU, crun, iproute2, nftables", direct.once),
            Side("supercloud up", lambda: ours(made, manifest), at_most=AT_MOST),
        ]
        return run("examples/hello.yaml, from nothing to both serving", "s", sides, options)


if __name__ == "__main__":
    if os.environ.get("SUPERCLOUD_BENCH_MOUNTS") != "private":
        os.environ["SUPERCLOUD_BENCH_MOUNTS"] = "private"
        os.execvp(
            "unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        )
    sys.exit(main())
