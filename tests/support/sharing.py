"""How the files of tests are shared out to two processes of pytest (``scripts/test``).

One goes through the files with virtual machines, one at a time as two cores like it, and the other
through the rest meanwhile; whoever has done its own takes from the other's. A file is run whole
and in its order by one process, so that its tests may build on each other.
"""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ROOT = Path(__file__).parents[2]
# These take longest: begun last, one of them would be waited for by a process with nothing to do.
FIRST = (
    "tests/system/test_core_guest.py",
    "tests/system/test_checkpoints.py",
    "tests/system/test_volumes.py",
    "tests/system/test_platform_checkpoint.py",
    "tests/component/test_agent_volumes.py",
    "tests/system/test_template.py",
    "tests/component/test_image_build.py",
    "tests/security/test_objects_disk.py",
    "tests/property/test_control_crash.py",
    "tests/component/test_lower_replicas.py",
    "tests/system/test_two_hosts.py",  # two machines at a time: while the other has none
)


@cache
def has_machines(file: str) -> bool:
    """Whether tests of this file, named from the root of the repository, boot machines."""
    return "mark.vm" in (ROOT / file).read_text()


class Sharing(LoadFileScheduling):
    """The files by how long they take, those of each kind to the process that prefers it."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        machines = node.gateway.id == "gw0"
        files = [*filter(self.workqueue.__contains__, FIRST), *self.workqueue]
        chosen = next((file for file in files if has_machines(file) == machines), files[0])
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)
