"""OCI images to erofs: what comes out, by the real mkfs.erofs and fsck.erofs."""

import gzip
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid, NoResources, NotFound, Unsupported
from supercloud.upper.environments.limits import LIMITS, Limits
from supercloud.upper.environments.oci import ConvertedImage, convert, convert_async
from supercloud.upper.platform.image.tools import ToolTree
from support.oci import (
    Layout,
    Plain,
    directory,
    docker_archive,
    entry,
    extract,
    file,
    hardlink,
    layer,
    listing,
    sha256,
    symlink,
)


@pytest.fixture(scope="session")
def tools() -> ToolTree:
    return ToolTree()


class Converter:
    def __init__(self, place: Path, tools: ToolTree) -> None:
        self.place, self.tools, self.count = place, tools, 0

    def convert(self, ref: str, limits: Limits = LIMITS) -> ConvertedImage:
        return convert(ref, cache=self.place / "cache", tools=self.tools, limits=limits)

    def tree(self, *layers: bytes, kind: type[Layout] = Layout) -> Path:
        """The unpacked result of an image with these layers."""
        self.count += 1
        ref = kind(self.place / f"layout-{self.count}", layers).write()
        return extract(self.convert(ref).path, self.place / f"tree-{self.count}", self.tools)


@pytest.fixture
def converter(tmp_path: Path, tools: ToolTree) -> Converter:
    return Converter(tmp_path, tools)


@pytest.mark.root
def test_owners_modes_and_times_are_kept(converter: Converter) -> None:
    tree = converter.tree(
        layer(
            directory("home", uid=1000, gid=1001, mode=0o750),
            file("home/tool", b"x", uid=70000, gid=5_000_000, mode=0o4755, mtime=1_234_567_890),
        )
    )
    home, tool = os.lstat(tree / "home"), os.lstat(tree / "home/tool")
    assert (home.st_uid, home.st_gid, stat.S_IMODE(home.st_mode)) == (1000, 1001, 0o750)
    assert (tool.st_uid, tool.st_gid, stat.S_IMODE(tool.st_mode)) == (70000, 5_000_000, 0o4755)
    assert tool.st_mtime == 1_234_567_890


READ_XATTRS = """
import json, os, sys
print(json.dumps({n: os.getxattr(sys.argv[1], n).hex() for n in os.listxattr(sys.argv[1])}))
"""


def xattrs_when_mounted(image: Path, name: str, at: Path) -> dict[str, bytes]:
    """As the kernel shows them, in a mount namespace of its own (fsck.erofs loses some)."""
    at.mkdir()
    script = 'mount -t erofs -o ro,loop "$1" "$2" && exec "$3" -c "$4" "$2/$5"'
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        "-",
        image,
        at,
        sys.executable,
        READ_XATTRS,
        name,
    ]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {key: bytes.fromhex(value) for key, value in found.items()}


@pytest.mark.root
def test_extended_attributes_are_kept_even_when_binary(converter: Converter) -> None:
    capability = b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(12)
    xattrs = {
        "security.capability": capability.decode("utf-8", "surrogateescape"),
        "user.note": "hé\udcff",
        "trusted.overlay.opaque": "y",
        "user.overlay.redirect": "/etc",
        "security.selinux": "host's",
    }
    ref = Layout(converter.place / "l", [layer(file("bin", b"x", xattrs=xattrs))]).write()
    found = xattrs_when_mounted(converter.convert(ref).path, "bin", converter.place / "mnt")
    assert found == {"security.capability": capability, "user.note": "hé".encode() + b"\xff"}


def test_contents_links_and_pipes_are_kept(converter: Converter) -> None:
    big = os.urandom(1 << 20) * 3
    tree = converter.tree(
        layer(
            file("a/b/c", b"content"),
            file("big", big),
            file("empty"),
            symlink("link", "a/b/c"),
            symlink("dangling", "/no/where"),
            entry("pipe", tarfile.FIFOTYPE),
        )
    )
    assert (tree / "a/b/c").read_bytes() == b"content"
    assert (tree / "big").read_bytes() == big
    assert (tree / "empty").read_bytes() == b""
    assert os.readlink(tree / "link") == "a/b/c"
    assert os.readlink(tree / "dangling") == "/no/where"
    assert stat.S_ISFIFO(os.lstat(tree / "pipe").st_mode)


def test_hard_links_share_an_inode_across_directories_and_layers(converter: Converter) -> None:
    tree = converter.tree(
        layer(file("one", b"same"), directory("d"), hardlink("d/two", "one")),
        layer(hardlink("three", "./d/two")),
    )
    inodes = {os.stat(tree / name).st_ino for name in ("one", "d/two", "three")}
    assert len(inodes) == 1
    assert (tree / "three").read_bytes() == b"same"


def test_a_hard_link_survives_the_deletion_of_the_name_it_was_made_from(
    converter: Converter,
) -> None:
    tree = converter.tree(
        layer(file("one", b"same"), hardlink("two", "one")), layer(file(".wh.one"))
    )
    assert listing(tree) == {"two"}
    assert (tree / "two").read_bytes() == b"same"


def test_device_nodes_are_left_out(converter: Converter) -> None:
    tree = converter.tree(
        layer(
            entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
            entry("whiteout", tarfile.CHRTYPE, devmajor=0, devminor=0),
            entry("disk", tarfile.BLKTYPE, devmajor=8, devminor=0),
            file("kept"),
        )
    )
    assert listing(tree) == {"kept"}


def test_an_upper_layer_replaces_files_and_whole_directories(converter: Converter) -> None:
    tree = converter.tree(
        layer(file("f", b"old"), file("d/x"), file("e/x"), symlink("s", "d"), file("g")),
        layer(file("f", b"new"), file("d", b"a file now"), directory("s"), directory("g")),
        layer(symlink("e", "f"), file("g/y")),
    )
    assert (tree / "f").read_bytes() == b"new"
    assert (tree / "d").read_bytes() == b"a file now"
    assert os.readlink(tree / "e") == "f"
    assert (tree / "s").is_dir()
    assert not (tree / "s").is_symlink()
    assert listing(tree) == {"f", "d", "e", "s", "g", "g/y"}


def test_a_directory_named_again_keeps_its_content_and_takes_the_new_mode(
    converter: Converter,
) -> None:
    tree = converter.tree(layer(file("d/x")), layer(directory("d", mode=0o700)))
    assert listing(tree) == {"d", "d/x"}
    assert stat.S_IMODE(os.stat(tree / "d").st_mode) == 0o700


def test_whiteouts_hide_files_and_trees_of_lower_layers_only(converter: Converter) -> None:
    tree = converter.tree(
        layer(file("a"), file("d/x"), file("d/y"), file("e/x")),
        layer(file(".wh.a"), file("d/.wh.x"), file(".wh.e"), file(".wh.never-there")),
        layer(file("e/fresh")),
    )
    assert listing(tree) == {"d", "d/y", "e", "e/fresh"}


@pytest.mark.parametrize("whiteout_first", [True, False])
def test_what_a_layer_hides_and_makes_anew_is_there_whatever_the_order(
    converter: Converter, *, whiteout_first: bool
) -> None:
    makes = [directory("d"), file("d/new"), file("f", b"new")]
    hides = [file(".wh.d"), file(".wh.f")]
    upper = [*hides, *makes] if whiteout_first else [*makes, *hides]
    tree = converter.tree(layer(file("d/old"), file("f", b"old")), layer(*upper))
    assert listing(tree) == {"d", "d/new", "f"}
    assert (tree / "f").read_bytes() == b"new"


@pytest.mark.parametrize("opaque_first", [True, False])
def test_an_opaque_directory_hides_what_lower_layers_have_in_it(
    converter: Converter, *, opaque_first: bool
) -> None:
    makes = [file("d/new"), file("d/sub/new")]
    hides = [file("d/.wh..wh..opq")]
    upper = [directory("d"), *(hides + makes if opaque_first else makes + hides)]
    tree = converter.tree(
        layer(file("d/old"), file("d/sub/old"), file("d/gone/old"), file("other")), layer(*upper)
    )
    assert listing(tree) == {"d", "d/new", "d/sub", "d/sub/new", "other"}


def test_metadata_of_aufs_is_ignored(converter: Converter) -> None:
    tree = converter.tree(layer(file("a"), file(".wh..wh.aufs"), directory(".wh..wh.plnk")))
    assert listing(tree) == {"a"}


def test_entries_below_a_symbolic_link_land_in_its_target_within_the_image(
    converter: Converter,
) -> None:
    tree = converter.tree(
        layer(directory("usr/bin"), symlink("bin", "usr/bin"), symlink("up", "../../usr")),
        layer(file("bin/tool", b"t"), file("up/lib/x"), file("bin/.wh.nothing")),
    )
    assert os.readlink(tree / "bin") == "usr/bin"
    assert (tree / "usr/bin/tool").read_bytes() == b"t"
    assert (tree / "usr/lib/x").exists()


def test_long_and_odd_names_are_kept(converter: Converter) -> None:
    long = "/".join(["d" * 200] * 5)
    odd = "sp ace\nnew\tline\udcff"
    tree = converter.tree(layer(file(long + "/" + "n" * 255), file(odd)))
    assert (tree / long / ("n" * 255)).exists()
    assert os.fsencode(odd) in os.listdir(os.fsencode(tree))


@pytest.mark.parametrize("kind", [Layout, Plain])
def test_compressed_and_plain_layers_give_the_same_tree(
    converter: Converter, kind: type[Layout]
) -> None:
    assert listing(converter.tree(layer(file("x/y")), kind=kind)) == {"x", "x/y"}


def test_zstd_layers_and_gzip_of_several_members(converter: Converter, tools: ToolTree) -> None:
    class Zstd(Layout):
        def pack(self, data: bytes) -> tuple[bytes, str]:
            return tools.run("zstd", "-c", given=data), "tar+zstd"

    class Members(Layout):
        def pack(self, data: bytes) -> tuple[bytes, str]:
            return b"".join(gzip.compress(part) for part in (data[:700], data[700:])), "tar+gzip"

    content = os.urandom(3 << 20)
    for kind in (Zstd, Members):
        tree = converter.tree(layer(file("x", content)), kind=kind)
        assert (tree / "x").read_bytes() == content


def test_the_config_is_read(converter: Converter) -> None:
    config = {
        "Entrypoint": ["/bin/serve"],
        "Cmd": ["-v"],
        "Env": ["A=1", "B=x=y"],
        "WorkingDir": "/srv",
        "User": "1000:1000",
        "ExposedPorts": {"8080/tcp": {}, "53/udp": {}, "99": {}},
        "StopSignal": "SIGQUIT",
    }
    ref = Layout(converter.place / "l", [layer(file("x"))], config).write()
    fresh, cached = converter.convert(ref).config, converter.convert(ref).config
    assert fresh == cached
    assert (fresh.entrypoint, fresh.cmd, fresh.env) == (("/bin/serve",), ("-v",), ("A=1", "B=x=y"))
    assert (fresh.workdir, fresh.user, fresh.stop_signal) == ("/srv", "1000:1000", "SIGQUIT")
    assert fresh.exposed_ports == ((53, "udp"), (99, "tcp"), (8080, "tcp"))


async def test_equal_images_give_equal_files_and_the_second_is_not_converted_again(
    converter: Converter, tools: ToolTree
) -> None:
    layers = [layer(*(file(f"f{number}", os.urandom(5000)) for number in range(20)))]
    ref = Layout(converter.place / "l", layers).write()
    first = converter.convert(ref)
    made_ns = first.path.stat().st_mtime_ns
    again = await convert_async(ref, cache=converter.place / "cache", tools=tools)
    elsewhere = convert(ref, cache=converter.place / "other", tools=tools)
    assert first == again
    assert first.path.stat().st_mtime_ns == made_ns
    assert elsewhere.path.read_bytes() == first.path.read_bytes()
    assert first.digest == sha256(first.path.read_bytes())
    assert first.size_bytes == first.path.stat().st_size


def test_the_right_platform_is_taken_from_an_index(converter: Converter) -> None:
    root = converter.place / "l"
    arm = Layout(root, [layer(file("arm"))], architecture="arm64").manifest()
    amd = Layout(root, [layer(file("amd"))]).manifest()
    holder = Layout(root)
    inner = holder.blob(json.dumps({"schemaVersion": 2, "manifests": [arm, amd]}).encode(), "index")
    holder.index([inner])
    image = converter.convert(f"oci:{root}")
    assert listing(extract(image.path, converter.place / "t", converter.tools)) == {"amd"}
    holder.index([holder.blob(json.dumps({"manifests": [arm]}).encode(), "index")])
    with pytest.raises(Unsupported, match="linux/amd64"):
        converter.convert(f"oci:{root}")


def test_tags_choose_and_a_wrong_one_is_answered_with_those_there_are(
    converter: Converter,
) -> None:
    root = converter.place / "l"
    holder, entries = Layout(root), []
    for tag in ("v1", "v2"):
        found = Layout(root, [layer(file(tag))]).manifest()
        found["annotations"] = {"org.opencontainers.image.ref.name": tag}
        entries.append(found)
    holder.index(entries)
    image = converter.convert(f"oci:{root}:v2")
    assert listing(extract(image.path, converter.place / "t", converter.tools)) == {"v2"}
    for ref in (f"oci:{root}", f"oci:{root}:v3"):
        with pytest.raises(NotFound, match="v1, v2"):
            converter.convert(ref)


@pytest.mark.parametrize("compress", [True, False])
def test_docker_archives(converter: Converter, *, compress: bool) -> None:
    layers = [layer(file("a"), file("b")), layer(file(".wh.a"))]
    ref = docker_archive(converter.place / "image.tar", layers, compress=compress)
    image = converter.convert(ref)
    assert image.config.cmd == ("/bin/sh",)
    assert listing(extract(image.path, converter.place / "t", converter.tools)) == {"b"}


def test_what_is_not_there_is_said(converter: Converter) -> None:
    with pytest.raises(NotFound, match="no OCI layout"):
        converter.convert(f"oci:{converter.place}/none")
    with pytest.raises(NotFound, match="no file"):
        converter.convert(f"docker-archive:{converter.place}/none.tar")


def test_limits_are_kept_before_the_disk_is_full(converter: Converter) -> None:
    bomb = layer(file("zeros", bytes(8 << 20)))
    ref = Layout(converter.place / "l", [bomb]).write()
    with pytest.raises(NoResources, match="too large"):
        converter.convert(ref, Limits(total_bytes=1 << 20))
    many = Layout(converter.place / "m", [layer(file(str(n))) for n in range(5)]).write()
    with pytest.raises(NoResources, match="layers"):
        converter.convert(many, Limits(layers=4))
    entries = Layout(converter.place / "e", [layer(*(file(str(n)) for n in range(50)))]).write()
    with pytest.raises(NoResources, match="entries"):
        converter.convert(entries, Limits(entries=20))
    assert [p.name for p in (converter.place / "cache").iterdir() if "convert-" in p.name] == []


def test_another_architecture_is_refused(converter: Converter) -> None:
    ref = Layout(converter.place / "l", [layer()], architecture="riscv64").write()
    with pytest.raises(Unsupported, match="riscv64"):
        converter.convert(ref)


def test_a_damaged_blob_is_refused(converter: Converter) -> None:
    root = converter.place / "l"
    ref = Layout(root, [layer(file("x", os.urandom(4000)))]).write()
    biggest = max((root / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)
    with pytest.raises(Invalid):
        converter.convert(ref)
