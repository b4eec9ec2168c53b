"""How the files of tests are shared out to two processes of pytest (``scripts/test``).

One goes through the files with virtual machines, one at a time as two cores like it, and the other
through the rest meanwhile; whoever has done its own takes from the other's. A file is run whole
and in its order by one process, so that its tests may build on each other.
"""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

_ROOT = Path(__file__).parents[2]


@cache
def has_machines(file: str) -> bool:
    """Whether tests of this file, named from the root of the repository, boot machines."""
    return "mark.vm" in (_ROOT / file).read_text()


class Sharing(LoadFileScheduling):
    """The files in order of their size, those of each kind to the process that prefers it."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        machines = node.gateway.id == "gw0"
        for file in self.workqueue:
            if has_machines(file) == machines:
                self.workqueue.move_to_end(file, last=False)
                break
        super()._assign_work_unit(node)
