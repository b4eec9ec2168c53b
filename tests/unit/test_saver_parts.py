"""Parts of checkpoints in a platform that need no platform: trees of files, CRIU's messages."""

import contextlib
import json
import os
import socket
import stat
import struct
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.model.errors import Invalid, Permanent, Unsupported
from supercloud.services.checkpoint.pages import Run
from supercloud.upper.platform.agent import criu, frozen_container
from supercloud.upper.platform.saver import trees
from supercloud.upper.platform.saver.requests import Found
from supercloud.upper.platform.saver.tracking import Kept
from supercloud.wire.messages import Blob, EnvironmentSpec, ImageRef, VolumeMount

OWNER = os.getuid()


def image(top: Path, spool: Path, owner: int = OWNER) -> bytes:
    copy = trees.Copy(str(top), str(spool), owner)
    copy.finish()
    data = b"".join(copy.stream())
    copy.close()
    return data


def unpacked(data: bytes, top: Path, owner: int = OWNER) -> None:
    top.mkdir()
    file = os.memfd_create("image")
    try:
        os.write(file, data)
        trees.unpack(file, str(top), owner)
    finally:
        os.close(file)


def listing(top: Path) -> dict[str, object]:
    """All that a tree is, but for inodes and change times."""
    found: dict[str, object] = {}
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(top))] = (
            status.st_mode, status.st_mtime_ns, status.st_nlink if not path.is_dir() else 0, content,
            {n: os.getxattr(path, n, follow_symlinks=False)
             for n in os.listxattr(path, follow_symlinks=False)},
        )  # fmt: skip
    return found


def fill(top: Path) -> None:
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "small").write_bytes(b"small")
    (top / "a" / "empty").touch()
    (top / "a" / "b" / "large").write_bytes(os.urandom(300_000))
    os.link(top / "a" / "small", top / "a" / "b" / "twice")
    (top / "out").symlink_to("/etc/passwd")
    (top / "a-b").write_text("sorts between")
    os.mkfifo(top / "pipe", 0o640)
    (top / "a" / "small").chmod(0o4755)
    (top / "a" / "b").chmod(0o1777)
    os.utime(top / "a" / "b", ns=(1_000_000_007, 1_000_000_007))


def test_a_tree_comes_back_with_all_that_it_had(tmp_path: Path) -> None:
    top = tmp_path / "top"
    fill(top)
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(top)
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    os.mknod(top / "whiteout", stat.S_IFCHR | 0o600, 0)
    os.setxattr(top / "a", "trusted.overlay.opaque", b"y")
    unpacked(image(top, tmp_path / "spool"), tmp_path / "back")
    assert listing(tmp_path / "back") == listing(top)


def test_what_did_not_change_stays_where_it_was(tmp_path: Path) -> None:
    """So that its chunks are there already: blocks of 64 KiB, whatever grew after them."""
    top = tmp_path / "top"
    fill(top)
    before = image(top, tmp_path / "spool")
    (top / "z").write_bytes(b"new")
    after = image(top, tmp_path / "spool")
    blocks = {before[at : at + 65536] for at in range(65536, len(before), 65536)}
    assert sum(after[at : at + 65536] in blocks for at in range(65536, len(after), 65536)) >= 4


def test_the_second_pass_copies_what_changed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees.time, "time_ns", lambda: int(2e18))  # all is old enough
    top = tmp_path / "top"
    fill(top)
    copy = trees.Copy(str(top), str(tmp_path / "spool"), OWNER)
    copy.ahead()
    (top / "a-b").write_text("changed, and longer")
    (top / "a" / "empty").unlink()
    assert copy.finish() == len("changed, and longer")
    unpacked(b"".join(copy.stream()), tmp_path / "back")
    copy.close()
    assert listing(tmp_path / "back") == listing(top)


def test_a_file_written_since_the_first_pass_began_is_copied_again(tmp_path: Path) -> None:
    """Its times may be the same: they are as coarse as a tick."""
    top = tmp_path / "top"
    fill(top)
    copy = trees.Copy(str(top), str(tmp_path / "spool"), OWNER)
    copy.ahead()
    status = (top / "a" / "b" / "large").stat()
    with (top / "a" / "b" / "large").open("r+b") as file:
        file.write(b"other")
    os.utime(top / "a" / "b" / "large", ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.finish()
    unpacked(b"".join(copy.stream()), tmp_path / "back")
    copy.close()
    assert (tmp_path / "back" / "a" / "b" / "large").read_bytes().startswith(b"other")


def test_owners_are_numbered_within_the_environment(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "file").touch()
    os.chown(top, 131072, 131072)
    os.chown(top / "file", 131072 + 1000, 131072 + 7)
    unpacked(image(top, tmp_path / "spool", 131072), tmp_path / "back", 65536)
    found = (tmp_path / "back" / "file").stat()
    assert (found.st_uid, found.st_gid) == (65536 + 1000, 65536 + 7)
    os.chown(top / "file", 0, 0)
    with pytest.raises(Invalid, match="nobody of the environment"):
        image(top, tmp_path / "spool", 131072)


CAPABILITY = "security.capability"


def capability(root: int) -> bytes:
    """cap_net_raw, effective, in the user namespace whose root is that."""
    return struct.pack("<6I", 0x0300_0001, 1 << 13, 0, 0, 0, root)


def test_capabilities_of_files_are_those_of_the_new_owners(tmp_path: Path) -> None:
    """Else a program that had some (ping) has none where its environment has other ids."""
    top = tmp_path / "top"
    top.mkdir()
    (top / "ping").touch()
    os.chown(top, 131072, 131072)
    os.chown(top / "ping", 131072, 131072)
    os.setxattr(top / "ping", CAPABILITY, capability(131072))
    unpacked(image(top, tmp_path / "spool", 131072), tmp_path / "back", 65536)
    assert os.getxattr(tmp_path / "back" / "ping", CAPABILITY) == capability(65536)


@pytest.mark.parametrize("attribute", ["system.posix_acl_access", "system.posix_acl_default"])
def test_access_lists_name_the_new_owners(attribute: str) -> None:
    def entries(user: int, group: int) -> bytes:
        nobody = 0xFFFF_FFFF
        rows = ((1, 6, nobody), (2, 4, user), (4, 4, nobody), (8, 4, group), (16, 4, nobody))
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)

    there = trees._renumbered(attribute, entries(131072 + 5, 131072 + 6), 131072, 0)
    assert there == entries(5, 6)
    assert trees._renumbered(attribute, there, 0, 65536) == entries(65536 + 5, 65536 + 6)
    for user in (131071, 131072 + trees.OWNERS):
        with pytest.raises(Invalid, match="nobody of the environment"):
            trees._renumbered(attribute, entries(user, 131072), 131072, 0)


def test_a_directory_that_becomes_a_link_while_it_is_read_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in the environment chooses the moment; the saver may read all of the platform."""
    monkeypatch.setattr(trees.time, "time_ns", lambda: int(2e18))  # all is old enough
    top, secrets, attributes = tmp_path / "top", tmp_path / "secrets", trees._attributes
    (top / "d").mkdir(parents=True)
    secrets.mkdir()
    (top / "d" / "file").write_text("own..")
    (secrets / "file").write_text("other")

    def between(path: str, *more: int) -> dict[str, str]:
        if path.endswith("/file") and not (top / "d").is_symlink():
            (top / "d").rename(top / "moved")
            (top / "d").symlink_to(secrets)
        return attributes(path, *more)

    copy = trees.Copy(str(top), str(tmp_path / "spool"), OWNER)
    monkeypatch.setattr(trees, "_attributes", between)
    copy.ahead()
    monkeypatch.setattr(trees, "_attributes", attributes)
    (top / "d").unlink()
    (top / "moved").rename(top / "d")
    copy.finish()
    unpacked(b"".join(copy.stream()), tmp_path / "back")
    copy.close()
    assert (tmp_path / "back" / "d" / "file").read_text() == "own.."


def test_a_file_that_is_another_when_it_is_opened_is_left_for_the_second_pass(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    status = (tmp_path / "a").lstat()
    at = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (tmp_path / "b").rename(tmp_path / "a")
        with pytest.raises(Invalid, match="another file"):
            trees._opened(at, "a", status)
        (tmp_path / "a").unlink()
        (tmp_path / "a").symlink_to("/etc/passwd")
        with pytest.raises(Invalid, match="no file any more"):
            trees._opened(at, "a", status)
    finally:
        os.close(at)


ASTRAY = f"supercloud-astray-{os.getpid()}"


def entry(**changes: object) -> dict[str, object]:
    values = {
        "path": "x",
        "mode": stat.S_IFREG | 0o644,
        "uid": 0,
        "gid": 0,
        "mtime_ns": 0,
        "size": 0,
    }
    return values | changes


@pytest.mark.parametrize(
    "bad",
    [
        [entry(path="../x")], [entry(path="/x")], [entry(path="a//b")], [entry(path="")],
        [entry(path="a/../../x")], [entry(uid=65536)], [entry(uid=-1)],
        [entry(mode=stat.S_IFBLK | 0o600, rdev=0x800)], [entry(mode=stat.S_IFCHR, rdev=0x103)],
        [entry(mode=0)], [entry(size=1 << 20)], [entry(size=-1)], [{"path": "x"}], [1], {"a": 1},
        [entry(path="d", mode=stat.S_IFLNK | 0o777, target="/tmp"), entry(path=f"d/{ASTRAY}")],
        [entry(path="y", link="../x")], [entry(mode=1 << 80)], [entry(size=1 << 80)],
        [entry(mode=stat.S_IFIFO, rdev=1 << 80)], [entry(mtime_ns=1 << 100)],
    ],
)  # fmt: skip
def test_an_index_that_leads_astray_is_refused(
    tmp_path: Path, bad: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is authentic; but a platform that somebody broke into may have made it."""
    (tmp_path / "x").write_text("ours")
    monkeypatch.setattr(trees.json, "dumps", lambda *_a, **_k: repr_json(bad))
    (tmp_path / "empty").mkdir()
    data = image(tmp_path / "empty", tmp_path / "spool")
    monkeypatch.undo()
    with pytest.raises((Invalid, OSError)):
        unpacked(data, tmp_path / "back")
    assert (tmp_path / "x").read_text() == "ours"
    assert not Path("/tmp", ASTRAY).exists()


def repr_json(value: object) -> str:
    import json

    return json.JSONEncoder().encode(value)


def of_index(packed: bytes) -> bytes:
    """An image with that for its index, and no contents."""
    return trees.MAGIC + len(packed).to_bytes(8, "little") + packed


@pytest.mark.parametrize(
    "packed",
    [
        b"", b"no zlib at all", zlib.compress(b"[]")[:-3], zlib.compress(b"[]") + b"more",
        zlib.compress(b"[" * 100_000), zlib.compress(b"{"), zlib.compress(b"\xff"),
        zlib.compress(b"null"),
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(tmp_path: Path, packed: bytes) -> None:
    with pytest.raises(Invalid):
        unpacked(of_index(packed), tmp_path / "back")
    assert not list((tmp_path / "back").iterdir())


def test_more_files_than_an_image_may_have_are_refused_before_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "MAX_ENTRIES", 3)
    entries = [entry(path=f"f{n}") for n in range(4)]
    with pytest.raises(Invalid, match="3 files"):
        unpacked(of_index(zlib.compress(json.dumps(entries).encode())), tmp_path / "back")
    assert not list((tmp_path / "back").iterdir())
    fewer = zlib.compress(json.dumps(entries[:3]).encode())
    unpacked(of_index(fewer), tmp_path / "fewer")
    assert len(list((tmp_path / "fewer").iterdir())) == 3


def test_an_index_larger_than_it_may_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "MAX_INDEX_BYTES", 1 << 20)
    with pytest.raises(Invalid, match="too large"):
        unpacked(of_index(zlib.compress(b" " * (2 << 20) + b"[]")), tmp_path / "back")


@pytest.mark.parametrize("cut", [0, 10, 16, 40, 65536, 70000])
def test_an_image_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    fill(tmp_path / "top")
    data = image(tmp_path / "top", tmp_path / "spool")[:cut]
    with pytest.raises(Invalid):
        unpacked(data, tmp_path / "back")


# -- pages that were kept


def test_kept_pages_are_found_by_their_place_in_the_ram() -> None:
    pages = [bytes([number]) * 4096 for number in range(5)]
    kept = Kept(bytearray(b"".join(pages)), [Run(3, 2), Run(9, 1), Run(20, 2)], 5 * 4096)
    assert kept.read_at(3 * 4096, 8192) == pages[0] + pages[1]
    assert kept.read_at(4 * 4096, 4096) == pages[1]
    assert kept.read_at(9 * 4096, 4096) == pages[2]
    assert kept.read_at(21 * 4096, 4096) == pages[4]
    for offset, size in (
        (0, 4096),
        (2 * 4096, 4096),
        (4 * 4096, 8192),
        (9 * 4096, 8192),
        (22 * 4096, 1),
    ):
        with pytest.raises(Invalid):
            kept.read_at(offset, size)


# -- a container's output


def test_the_output_of_a_program_is_found_where_it_still_is(tmp_path: Path) -> None:
    """It may have closed one, or have it write to a file of its own."""
    fifo = tmp_path / "output"
    os.mkfifo(fifo)
    number = os.open(fifo, os.O_RDWR)
    try:
        for outputs, found in (
            ({"stdout": number, "stderr": number}, True),
            ({"stdout": subprocess.DEVNULL, "stderr": number}, True),
            ({"stdout": number, "stderr": subprocess.DEVNULL}, True),
            ({"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}, False),
        ):
            with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, **outputs) as program:
                if found:
                    named = frozen_container.output_of(program.pid, str(fifo))
                    assert named.endswith(f":{os.stat(fifo).st_ino:x}]")
                else:
                    with pytest.raises(Unsupported, match="writes it elsewhere"):
                        frozen_container.output_of(program.pid, str(fifo))
                program.communicate(b"")
        with pytest.raises(Unsupported):
            frozen_container.output_of(program.pid, str(fifo))
    finally:
        os.close(number)


IMAGE = "sha256:" + "1" * 64
DETAILS = {
    "spec": IMAGE,
    "output": "file[1f:a2]",
    "mounts": '{"/etc/hosts":"","/data":"","/dev/null":"null"}',
}


def restored(**details: str) -> list[str]:
    """What CRIU is told of a container whose checkpoint says so."""
    container = SimpleNamespace(
        places=SimpleNamespace(run="/run/here"),
        spec=EnvironmentSpec(
            name="web", uid="e1", kind="container",
            image=ImageRef(format="erofs", blobs={"root": Blob(digest=IMAGE, size_bytes=1)}),
            volumes=[VolumeMount(volume="data", path="/data", read_only=True)],
        ),
    )  # fmt: skip
    given = {name: value for name, value in {**DETAILS, **details}.items() if value != "-"}
    found = Found(engine="criu", sequence=1, parts={}, details=given)
    frozen_container._check(container, found)  # type: ignore[arg-type]
    return frozen_container._externals(container, given)  # type: ignore[arg-type]


def test_what_was_mounted_is_of_this_platform_again() -> None:
    hosts, data, null = restored()
    assert (hosts, null) == ("mnt[/etc/hosts]:/run/here/hosts", "mnt[/dev/null]:/dev/null")
    assert data.startswith("mnt[/data]:/run/here/")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("mounts", "-", "what was mounted"), ("mounts", "", "what was mounted"),
        ("mounts", "{", "what was mounted"), ("mounts", "[]", "what was mounted"),
        ("mounts", "[" * 100_000, "what was mounted"), ("mounts", '{"/x": 1}', "what was mounted"),
        ("mounts", '{"/etc/shadow": ""}', "/etc/shadow"), ("mounts", '{"/x": "sda"}', "/x"),
        ("output", "-", "output"), ("output", "", "output"), ("output", "file[1:2", "output"),
        ("output", "mnt[/]", "output"), ("spec", "-", "another image"),
    ],
)  # fmt: skip
def test_details_that_say_something_else_are_refused(name: str, value: str, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        restored(**{name: value})


# -- CRIU's messages


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1000), st.one_of(st.integers(0, (1 << 64) - 1), st.binary(max_size=300))
        )
    )
)
def test_fields_are_read_as_they_were_written(given_fields: list[tuple[int, int | bytes]]) -> None:
    assert list(criu.fields(criu.message(*given_fields))) == given_fields


@given(st.binary(max_size=100))
def test_junk_for_fields_is_refused(untrusted: bytes) -> None:
    with contextlib.suppress(Permanent):
        list(criu.fields(untrusted))


def test_crius_first_error_is_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(00.1) pie: fine\n(00.2) 1: Error (criu/files.c:12): Can't do it: No\n"
        "(00.3) Error (criu/x.c:1): Dumping FAILED.\n"
    )
    assert criu.complaint(str(log)) == "Can't do it: No"
    assert criu.complaint(str(tmp_path / "none")) == ""
