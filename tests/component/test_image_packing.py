"""Kernel and initrd in one compressed erofs: what comes out is what went in, every time the same."""

import subprocess
from pathlib import Path

import pytest

from supercloud.control.convert import pack_in_process
from supercloud.model.errors import Permanent, SupercloudError
from supercloud.upper.environments.packing import pack
from supercloud.upper.platform.image.tools import ToolTree


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    kernel, initrd = tmp_path / "vmlinux-6.1", tmp_path / "initrd.img"
    kernel.write_bytes(b"kernel " * 500_000)
    initrd.write_bytes(bytes(range(256)) * 1000)
    kernel.chmod(0o600)
    return {"kernel": kernel, "initrd": initrd}


def test_packing_is_reversible_reproducible_and_readable_by_all(
    files: dict[str, Path], tmp_path: Path
) -> None:
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "out"
    pack(files, one, ToolTree())
    pack_in_process(files, other)
    assert one.read_bytes() == other.read_bytes()
    assert one.stat().st_size < sum(path.stat().st_size for path in files.values()) / 2
    tool = ToolTree().argv("fsck.erofs")
    subprocess.run([*tool, f"--extract={out}", str(one)], check=True, capture_output=True)
    for name, path in files.items():
        assert (out / name).read_bytes() == path.read_bytes()
        assert (out / name).stat().st_mode & 0o444 == 0o444
    assert not list(tmp_path.glob(".pack-*"))


def test_what_cannot_be_packed_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=r"mkfs\.erofs"):
        pack(files, tmp_path, ToolTree())
    files["kernel"].unlink()
    with pytest.raises((SupercloudError, OSError)):
        pack_in_process(files, tmp_path / "none")
