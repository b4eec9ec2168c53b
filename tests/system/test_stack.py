"""The stack that the other tests stand on cleans up also after tests that are killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.inventory import inventory, machine, uids_of
from support.stack import wait_for

pytestmark = pytest.mark.root

HOLD = """\
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.stack import stack
with stack(Path(sys.argv[2])) as made:
    host = made.hosts["here"]
    print(made.directory, host.instance, host.ports.start, host.ports.stop, host.port, flush=True)
    time.sleep(300)
"""


def test_a_killed_test_leaves_nothing(product_images: Path) -> None:
    nothing = machine()
    argv = [sys.executable, "-c", HOLD, str(Path(__file__).parents[1]), str(product_images)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        directory, instance, *ports = killed.stdout.readline().split()
        uids, wanted = uids_of(instance), range(*map(int, ports[:2]))
        assert inventory(instance, uids, wanted).processes
        killed.kill()
    wait_for(lambda: not Path(directory).exists(), 120)
    wait_for(lambda: not inventory(instance, uids, wanted).since(nothing), 120)
