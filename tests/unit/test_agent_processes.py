"""Children that the agent forks without running another program."""

import os
import tempfile

import pytest

from supercloud.model.errors import Permanent
from supercloud.upper.platform.agent import filesystem
from supercloud.upper.platform.agent.processes import fork


def test_a_forked_child_has_what_it_is_given_and_nothing_else_of_ours() -> None:
    """A copy of a descriptor that was closed here meanwhile would keep a disk in use."""
    out, back = os.pipe()
    with tempfile.TemporaryFile() as other, os.fdopen(out, "rb") as told:

        def body() -> int:
            left = [int(name) for name in os.listdir("/proc/self/fd")]
            os.write(back, " ".join(str(n) for n in sorted(left) if n > 2).encode())
            return 7 if other.fileno() not in left else 8

        child = fork(body, [back])
        os.close(back)
        left = [int(n) for n in told.read().split()]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert back in left
    assert len(left) == 2, "what it was given, and the listing itself"


def test_a_child_whose_work_fails_says_so_by_its_exit_status() -> None:
    def body() -> int:
        raise OSError("no")

    assert os.waitstatus_to_exitcode(os.waitpid(fork(body), 0)[1]) == 1


@pytest.mark.parametrize(
    ("said", "is_in_use"),
    [("/dev/vdd is in use.\\ne2fsck: Cannot continue, aborting.", True), ("bad magic", False)],
)
async def test_a_tool_that_finds_the_disk_taken_is_told_from_one_that_fails(
    said: str, is_in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: str, **__: object) -> bytes:
        raise Permanent(f"e2fsck failed with 8: {said}")

    monkeypatch.setattr(filesystem, "run", run)
    with pytest.raises((filesystem.InUse, Permanent)) as caught:
        await filesystem.check("/dev/vdd")
    assert isinstance(caught.value, filesystem.InUse) == is_in_use
