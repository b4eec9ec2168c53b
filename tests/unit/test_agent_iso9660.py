"""The reader of config disks: what the control plane writes, and what is damaged on purpose."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.control import bootdata as ours
from supercloud.model.errors import Invalid, NotFound, UserError
from supercloud.upper.platform.agent import bootdata
from supercloud.upper.platform.agent.iso9660 import MAX_FILE_BYTES, Iso

USER = ours.user_data("demo", "p1", "0" * 64, "CA " * 3000, ["169.254.77.1:7444"])
DISK = ours.config_iso("demo", "p1", USER)


def on_disk(directory: Path, content: bytes) -> str:
    """As a host gives it: a disk of whole pages."""
    path = directory / "config"
    path.write_bytes(content + bytes(-len(content) % 4096))
    return str(path)


def test_boot_data_and_host_name_are_read_as_they_were_written(tmp_path: Path) -> None:
    device = on_disk(tmp_path, DISK)
    iso = Iso(device)
    assert iso.read("openstack/latest/user_data") == USER
    with pytest.raises(NotFound):
        iso.read("openstack/latest/vendor_data")
    iso.close()
    boot, name = bootdata.load_directly(device)
    assert (boot.platform, boot.ca_pem, name) == ("p1", "CA " * 3000, "p1")


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    device = on_disk(tmp_path, DISK)
    gc.collect()  # what tests before have left open is not ours to count
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        bootdata.load_directly(device)
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(Invalid):
            Iso(on_disk(tmp_path / "empty", b""))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("content", [bytes(1 << 20), b"", b"x" * 40960, DISK[: 17 * 2048]])
def test_what_is_no_such_disk_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Invalid):
        bootdata.load_directly(on_disk(tmp_path, content))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DISK) - 1), st.integers(0, 255)), max_size=40))
def test_a_damaged_disk_is_refused_or_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    content = bytearray(DISK)
    for at, value in damage:
        content[at] = value
    device = on_disk(tmp_path_factory.mktemp("iso"), bytes(content))
    try:
        iso = Iso(device)
        try:
            assert len(iso.read("openstack/latest/user_data")) <= MAX_FILE_BYTES
        finally:
            iso.close()
    except UserError:
        pass
