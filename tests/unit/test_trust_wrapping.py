"""Data keys of volumes: wrapped, rotated at any moment, and readable by their owner only."""

import stat

import pytest

from supercloud.model.errors import Denied, NotFound, Permanent
from supercloud.trust.wrapping import VolumeKeys


def keys_in(tmp_path, ucloud="u"):
    return VolumeKeys.ensure(str(tmp_path), ucloud)


def test_a_data_key_comes_back_as_it_was_made_also_in_another_life(tmp_path):
    wrapped = keys_in(tmp_path).make()
    key = keys_in(tmp_path).unwrap(wrapped)
    assert len(key) == 32
    assert key.hex() not in wrapped
    assert keys_in(tmp_path).unwrap(wrapped) == key


def test_every_data_key_is_another(tmp_path):
    keys = keys_in(tmp_path)
    assert len({keys.unwrap(keys.make()) for _ in range(8)}) == 8


def test_the_file_is_its_owners_and_one_that_others_read_is_refused(tmp_path):
    keys_in(tmp_path)
    path = tmp_path / "u" / "volumes.keys"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(Denied, match="others may read"):
        keys_in(tmp_path)


def test_rotation_keeps_the_data_key_and_may_be_interrupted_anywhere(tmp_path):
    keys = keys_in(tmp_path)
    wrapped = [keys.make() for _ in range(3)]
    plain = [keys.unwrap(one) for one in wrapped]
    before = keys.current
    assert keys.rotate() != before
    keys = keys_in(tmp_path)  # killed here, and started anew
    wrapped[0] = keys.rewrapped(wrapped[0])
    assert keys.settle(wrapped) == 0  # two are under the old one yet
    keys = keys_in(tmp_path)
    wrapped = [keys.rewrapped(one) for one in wrapped]
    assert keys.settle(wrapped) == 1
    keys = keys_in(tmp_path)
    assert [keys.unwrap(one) for one in wrapped] == plain
    assert {one.partition(":")[0] for one in wrapped} == {keys.current}
    assert keys.rewrapped(wrapped[0]) == wrapped[0]


def test_after_rotation_the_old_wrapping_opens_nothing_any_more(tmp_path):
    keys = keys_in(tmp_path)
    old = keys.make()
    keys.rotate()
    keys.settle([keys.rewrapped(old)])
    with pytest.raises(NotFound, match="wrapping key"):
        keys.unwrap(old)


@pytest.mark.parametrize("change", ["flip", "cut", "text"])
def test_a_tampered_wrapping_is_refused(tmp_path, change):
    keys = keys_in(tmp_path)
    wrapped = keys.make()
    other = "A" if wrapped[-10] != "A" else "B"
    bad = {
        "flip": wrapped[:-10] + other + wrapped[-9:], "cut": wrapped[:-8],
        "text": wrapped.partition(":")[0] + ":no base64 at all",
    }[change]  # fmt: skip
    with pytest.raises(Denied):
        keys.unwrap(bad)


def test_keys_of_another_ucloud_open_nothing(tmp_path):
    wrapped = keys_in(tmp_path).make()
    with pytest.raises(NotFound):
        keys_in(tmp_path, "v").unwrap(wrapped)


@pytest.mark.parametrize("content", [b"", b"zz\n", b"00" * 31 + b"\n"])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path, content):
    keys_in(tmp_path)
    path = tmp_path / "u" / "volumes.keys"
    path.write_bytes(content)
    with pytest.raises(Permanent, match="damaged"):
        keys_in(tmp_path)
