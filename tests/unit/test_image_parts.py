"""The builder's parts, each on its own."""

import gzip
import io
import lzma
import marshal
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image import (
    bytecode,
    closure,
    elf,
    kernel,
    modules,
    own,
    recipe,
    tree,
)
from supercloud.upper.platform.image.tree import Tree, directory, file, link, resolve


def test_links_are_followed_within_the_tree() -> None:
    files: Tree = {
        "usr/bin/real": file("x"),
        "usr/bin/a": link("real"),
        "usr/bin/b": link("/bin/a"),
        "etc/deep": link("../usr/./bin/../bin/b"),
        "etc/loop": link("loop"),
        "etc/out": link("../../../usr/bin/real"),
        "etc/nowhere": link("missing"),
    }
    assert resolve(files, "/bin/b") == (["usr/bin/b", "usr/bin/a"], "usr/bin/real")
    assert resolve(files, "etc/deep")[1] == "usr/bin/real"
    assert resolve(files, "etc/out")[1] == "usr/bin/real"
    assert resolve(files, "etc/loop")[1] is None
    assert resolve(files, "etc/nowhere")[1] is None


def test_what_an_elf_file_needs_is_what_ldd_says() -> None:
    program = Path("/bin/bash").resolve().read_bytes()
    listed = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
    names = elf.needed(program)
    assert "libc.so.6" in names
    for name in names:
        assert name in listed
    assert elf.needed(b"#!/bin/sh\n") == []


def test_the_closure_brings_libraries_and_links_and_nothing_else() -> None:
    libraries = "usr/lib/x86_64-linux-gnu"
    bash = Path("/bin/bash").resolve().read_bytes()
    needed = elf.needed(bash)
    files: Tree = {"usr/bin/bash": file(bash), "usr/bin/sh": link("bash"), "usr/bin/x": file("x")}
    for name in needed:
        place = tree.merged(name) if name.startswith("/") else f"{libraries}/{name}"
        files[place] = link(f"{Path(place).name}.real")
        files[f"{place}.real"] = file("library")
    kept = closure.close(files, ["bin/sh"])
    assert set(kept) == set(files) - {"usr/bin/x"}
    del files[next(path for path in files if path.endswith("libc.so.6"))]
    with pytest.raises(Permanent, match="libc"):
        closure.close(files, ["bin/sh"])


def test_a_recipe_that_asks_for_what_is_not_there_is_told() -> None:
    files: Tree = {"usr/bin/a": file("x"), "usr/lib/d": directory()}
    assert closure.matching(files, ["usr/bin/a", "usr/bin/*"]) == ["usr/bin/a", "usr/bin/a"]
    for pattern in ("usr/bin/b", "usr/lib/*", "opt/*"):
        with pytest.raises(Permanent, match="recipe"):
            closure.matching(files, [pattern])


def test_tars_do_not_depend_on_the_order_in_which_files_came() -> None:
    items = [("b", file("2", 0o755)), ("a", file("1")), ("c", link("a")), ("d", directory(0o700))]
    forwards, backwards = dict(items), dict(reversed(items))
    assert tree.to_tar(forwards) == tree.to_tar(backwards)
    assert tree.to_cpio(forwards) == tree.to_cpio(backwards)
    with tarfile.open(fileobj=io.BytesIO(tree.to_tar(forwards) + tree.TAR_END)) as tar:
        found = {member.name: member for member in tar}
    assert list(found) == ["a", "b", "c", "d"]
    assert {member.mtime for member in found.values()} == {tree.EPOCH_S}
    assert (found["b"].mode, found["c"].linkname, found["d"].mode) == (0o755, "a", 0o700)


def test_the_cpio_is_what_cpio_reads(tmp_path: Path) -> None:
    files = tree.with_parents({"x/file": file("content"), "x/link": link("file")})
    names = []
    data = tree.to_cpio(files)
    place = 0
    while (name_bytes := int(data[place + 94 : place + 102], 16)) and place < len(data):
        size = int(data[place + 54 : place + 62], 16)
        name = data[place + 110 : place + 109 + name_bytes].decode()
        names.append((name, int(data[place + 14 : place + 22], 16)))
        if name == "TRAILER!!!":
            break
        place = (place + 110 + name_bytes + 3) // 4 * 4
        place = (place + size + 3) // 4 * 4
    assert [name for name, _ in names] == ["x", "x/file", "x/link", "TRAILER!!!"]
    assert [stat.S_IFMT(mode) for _, mode in names[:3]] == [
        stat.S_IFDIR,
        stat.S_IFREG,
        stat.S_IFLNK,
    ]


def test_set_uid_bits_do_not_enter_the_images(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    (root / "bin").mkdir()
    (root / "bin/su").write_text("x")
    (root / "bin/su").chmod(0o4755)
    deb = tmp_path / "x.deb"
    subprocess.run(["dpkg-deb", "-b", root, deb], check=True, capture_output=True)
    found = tree.from_debs([deb], recipe.SKIP)
    assert stat.S_IMODE(found["usr/bin/su"].mode) == 0o755


def test_bytecode_is_unchecked_and_says_where_it_came_from() -> None:
    made = bytecode.compile_source(b"x = 1\n", "/opt/x.py")
    assert struct.unpack_from("<I", made, 4) == (1,)
    code = marshal.loads(made[16:])
    assert code.co_filename == "/opt/x.py"


def bzimage(payload: bytes) -> bytes:
    """A kernel image with one setup sector and ``payload``."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 0, len(payload) + 4)
    return bytes(head) + payload + struct.pack("<I", 0)


def small_elf() -> bytes:
    header = bytearray(64 + 2 * 56)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<QQ", header, 32, 64, 0)
    struct.pack_into("<HH", header, 54, 56, 2)
    struct.pack_into("<IIQQQQQQ", header, 64, 1, 5, 256, 0, 0, 100, 100, 1)
    struct.pack_into("<IIQQQQQQ", header, 120, 1, 7, 512, 0, 0, 4096, 8192, 1)
    return bytes(header).ljust(256, b"\0") + b"t" * 256 + (b"data" + bytes(4092)) + b"relocations"


class NoTools:
    def run(self, tool: str, *arguments: str | Path) -> bytes:
        raise AssertionError(tool)


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, lzma.compress, lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)],
)
def test_the_kernel_is_found_in_its_image_and_loses_what_pvh_does_not_read(pack) -> None:  # type: ignore[no-untyped-def]
    found = kernel.vmlinux(bzimage(pack(small_elf())), NoTools())
    assert found.endswith(b"data")
    assert len(found) == 516
    file_size, memory_size = struct.unpack_from("<QQ", found, 120 + 32)
    assert (file_size, memory_size) == (4, 8192)


@pytest.mark.parametrize(
    "image", [b"", bytes(2048), bzimage(b"unknown"), bzimage(gzip.compress(b"no"))]
)
def test_what_is_no_kernel_is_refused(image: bytes) -> None:
    with pytest.raises((Permanent, IndexError)):
        kernel.vmlinux(image, NoTools())


def test_our_code_is_hashed_by_path_content_and_mode(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    (tmp_path / "a/__pycache__").mkdir()
    (tmp_path / "a/__pycache__/x.pyc").write_text("never")
    first = own.sources(["a"], tmp_path)
    assert list(first) == [f"{own.PLACE}/a/x.py"]
    (tmp_path / "a/x.py").write_text("2")
    assert own.digest(own.sources(["a"], tmp_path)) != own.digest(first)
    renamed = {f"{path}2": node for path, node in first.items()}
    assert own.digest(renamed) != own.digest(first)


def test_an_engine_that_was_not_compiled_is_missed(tmp_path: Path) -> None:
    (tmp_path / "services/protection/native").mkdir(parents=True)
    (tmp_path / "services/protection/native/x.c").write_text("int x;")
    with pytest.raises(Permanent, match="not compiled"):
        own.sources(["services"], tmp_path)
    (tmp_path / "services/protection/libprotection.so").write_bytes(b"\x7fELF")
    assert list(own.sources(["services"], tmp_path)) == [f"{own.PLACE}/{own.COMPILED['services']}"]


def test_modules_lose_their_signature_and_nothing_else() -> None:
    body, mark = b"\x7fELF" + bytes(range(200)), b"~Module signature appended~\n"
    signature = b"s" * 411
    signed = body + signature + bytes(8) + struct.pack(">I", len(signature)) + mark
    assert modules.unsigned(signed) == body
    assert modules.unsigned(body) == body
    with pytest.raises(ValueError, match="longer than itself"):
        modules.unsigned(body + bytes(8) + struct.pack(">I", 1 << 20) + mark)
