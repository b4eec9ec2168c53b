"""``supercloud up`` of examples/hello.yaml with warm templates, to both EEs serving.

As ``up.py``, whose direct way it is measured against; before each of ours the control plane has had
its host make a template of the platform with the example's EEs ready in it. Run as root.
"""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

from ab import Side, arguments, run
from direct.hello import prepared
from up import BODY, ours

from support.slots import vm_slots
from support.stack import Stack, stack

AT_MOST = 0.2
MADE_S = 240.0


def wait_until_warm(made: Stack) -> None:
    """Until the control plane has heard that the template is ready."""
    end = time.monotonic() + MADE_S
    while True:
        said = made.cli("doctor", "--json", status=None).stdout
        if '"found": "ready: 1 cpus, 1024 MiB with 2 environments' in said:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"no template: {said}\n{made.logs()}")
        time.sleep(0.5)


def warm(made: Stack, manifest: str) -> float:
    """Seconds from the command to both URLs answering."""
    wait_until_warm(made)
    time.sleep(1)
    return ours(made, manifest)


def main() -> int:
    options = arguments(rounds=5)
    with (
        vm_slots(),
        prepared() as direct,
        stack(ROOT / "build" / "images", templates="asked") as made,
    ):
        made.enrol("hello", "here")
        manifest = made.manifest("hello", BODY.format(build=ROOT / "build" / "examples"))
        ours(made, manifest)  # from a boot: after it there is something to make a template of
        sides = [
            Side("by hand: QEMU, crun, iproute2, nftables", direct.once),
            Side("supercloud up, warm", lambda: warm(made, manifest), at_most=AT_MOST),
        ]
        return run("examples/hello.yaml, from nothing to both serving", "s", sides, options)


if __name__ == "__main__":
    if os.environ.get("SUPERCLOUD_BENCH_MOUNTS") != "private":
        os.environ["SUPERCLOUD_BENCH_MOUNTS"] = "private"
        os.execvp(
            "unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        )
    sys.exit(main())
