"""The core's tests once more in a Debian-kernel guest: cgroup v2 only, Python 3.13.

The suite travels as an archive: our sources, the tests, and pytest with what the image's Python
lacks for it; all of that is Python alone.
"""

import io
import re
import tarfile
import unittest
from pathlib import Path

import _pytest
import iniconfig
import packaging
import pluggy
import py
import pygments
import pytest
import pytest_timeout

from support import guest
from support.guest import Guest

TESTS = Path(__file__).parents[1]
SUITES = [
    "component/test_core_host.py",
    "component/test_core_kinds.py",
    "component/test_core_recovery.py",
    "security/test_core_abuse.py",
    "security/test_core_confinement.py",
]
SLOW = {  # emulated, a core takes seconds to come back; how many tests each is
    "test_kills_at_random_moments_keep_tables_processes_and_groups_in_step": 4,
    "test_nothing_leaks_over_many_cores": 1,
    "test_deaths_while_the_core_is_away_are_noticed": 1,
    "test_a_table_is_never_overfilled": 1,
}
PARTS = [_pytest, iniconfig, packaging, pluggy, pygments, pytest, unittest]
CONFIGURATION = b"[pytest]\nmarkers =\n    root\n    vm\n    long\naddopts = -p no:cacheprovider\n"
RUN = """
grep -q cgroup2 /proc/self/mountinfo && ! grep -q ' - cgroup ' /proc/self/mountinfo && echo V2-ONLY
mkdir /tmp/suite && tar -xf /guest/suite.tar -C /tmp/suite && cd /tmp/suite/tests || exit 1
export PYTHONPATH=/tmp/suite/src:/tmp/suite/site PYTHONDONTWRITEBYTECODE=1
python3 -m pytest -q -x --color=no -c ../pytest.ini --rootdir=.. -p pytest_timeout --timeout=300 -k '{chosen}' {suites}
"""


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(TESTS.parent / "src", "src", filter=_sources)
        for name in [*SUITES, "core_host.py"]:
            tar.add(TESTS / name, f"tests/{name}")
        for part in PARTS:
            tar.add(Path(part.__file__).parent, f"site/{part.__name__}", filter=_sources)
        for module in (pytest_timeout, py):
            tar.add(module.__file__, f"site/{module.__name__}.py")
        entry = tarfile.TarInfo("pytest.ini")
        entry.size = len(CONFIGURATION)
        tar.addfile(entry, io.BytesIO(CONFIGURATION))
    return out.getvalue()


def _sources(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


@pytest.mark.vm
@pytest.mark.timeout(900)
def test_the_core_holds_on_a_debian_kernel_with_cgroup_v2_alone(vm_lock: None) -> None:
    chosen = " and ".join(f"not {name}" for name in SLOW)
    script = RUN.format(suites=" ".join(SUITES), chosen=chosen)
    machine = Guest(script=script, files={"suite.tar": archive()}, memory_mib=3072, cpus=2)
    status, printed = guest.run(machine, timeout_s=850)
    assert "V2-ONLY" in printed, printed
    assert status == 0, printed
    assert int(re.findall(r"(\d+) passed", printed)[-1]) > 170
    assert int(re.findall(r"(\d+) deselected", printed)[-1]) == sum(SLOW.values())
