"""Container images made to do harm: each is refused with a reason, or does none."""

import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid, NoResources, NotFound, SupercloudError, Unsupported
from supercloud.upper.environments.limits import LIMITS, Limits
from supercloud.upper.environments.oci import convert
from supercloud.upper.platform.image.tools import ToolTree
from support.oci import (
    Layout,
    Plain,
    directory,
    docker_archive,
    extract,
    file,
    hardlink,
    layer,
    listing,
    sha256,
    symlink,
)

TOOLS = ToolTree()


def convert_layers(place: Path, *layers: bytes, limits: Limits = LIMITS) -> Path:
    ref = Plain(place / "layout", layers).write()
    return convert(ref, cache=place / "cache", tools=TOOLS, limits=limits).path


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/../evil", "a/..", "..", "a/../b", "./../x"]
)
def test_names_that_climb_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid, match="climbs"):
        convert_layers(tmp_path, layer(file(name, b"x")))


def test_absolute_names_stay_in_the_image(tmp_path: Path) -> None:
    image = convert_layers(tmp_path, layer(file(f"/{tmp_path.name}-evil", b"x")))
    assert listing(extract(image, tmp_path / "t", TOOLS)) == {f"{tmp_path.name}-evil"}
    assert not Path(f"/{tmp_path.name}-evil").exists()


@pytest.mark.parametrize("target", ["/", "/etc", "../../../../../../..", "..", "."])
def test_a_link_as_parent_leads_nowhere_but_into_the_image(tmp_path: Path, target: str) -> None:
    name = f"evil-{tmp_path.name}"
    image = convert_layers(
        tmp_path, layer(symlink("door", target)), layer(file(f"door/{name}", b"x"))
    )
    found = listing(extract(image, tmp_path / "t", TOOLS))
    assert f"etc/{name}" in found or name in found
    for place in (Path("/"), Path("/etc"), tmp_path, Path.cwd()):
        assert not (place / name).exists()


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="too many symbolic links"):
        convert_layers(tmp_path, layer(symlink("a", "b"), symlink("b", "a"), file("a/x")))


def test_links_that_grow_when_followed_are_refused(tmp_path: Path) -> None:
    entries = [symlink(f"l{n}", "/".join([f"l{n - 1}"] * 50)) for n in range(1, 30)]
    with pytest.raises(Invalid):
        convert_layers(tmp_path, layer(directory("l0"), *entries, file("l29/x")))


def test_a_file_as_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no directory"):
        convert_layers(tmp_path, layer(file("f"), file("f/x")))


@pytest.mark.parametrize("target", ["/etc/shadow", "../../etc/shadow", "missing", "d", "", "."])
def test_hard_links_name_only_files_of_the_image(tmp_path: Path, target: str) -> None:
    with pytest.raises(Invalid):
        convert_layers(tmp_path, layer(directory("d"), hardlink("stolen", target)))


def test_a_hard_link_through_a_symbolic_link_stays_in_the_image(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no file"):
        convert_layers(tmp_path, layer(symlink("door", "/etc"), hardlink("x", "door/passwd")))


def test_whiteouts_cannot_reach_out_either(tmp_path: Path) -> None:
    image = convert_layers(
        tmp_path,
        layer(file("a"), symlink("door", "/")),
        layer(file(".wh..."), file(".wh.."), file(".wh."), file("door/.wh.a")),
    )
    assert listing(extract(image, tmp_path / "t", TOOLS)) == {"door"}


@pytest.mark.parametrize("name", ["n" * 256, "/".join(["d"] * 600), "/".join(["d" * 250] * 20)])
def test_impossible_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid, match="impossible"):
        convert_layers(tmp_path, layer(file(name)))


def test_a_name_that_tunnels_deep_by_links_is_refused(tmp_path: Path) -> None:
    entries = [directory("/".join(["d"] * 300)), symlink("s", "/".join(["d"] * 300))]
    with pytest.raises(Invalid, match="deep"):
        convert_layers(tmp_path, layer(*entries, file("s/" + "/".join(["e"] * 300) + "/x")))


def test_a_bomb_of_zeros_is_stopped_early(tmp_path: Path) -> None:
    """10 GiB in 10 MB of gzip, read only until the limit."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    packed = b"".join(squeeze.compress(zeros) for _ in range(512)) + squeeze.flush()

    class Bomb(Layout):
        def pack(self, data: bytes) -> tuple[bytes, str]:
            return packed, "tar+gzip"

    ref = Bomb(tmp_path / "layout", [layer(file("x"))]).write()
    with pytest.raises(NoResources, match="too large"):
        convert(ref, cache=tmp_path / "cache", tools=TOOLS, limits=Limits(total_bytes=16 << 20))


def test_an_extended_header_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 6 << 30
    data = info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    with pytest.raises(NoResources, match="extended header"):
        convert_layers(tmp_path, data)


def test_a_file_of_an_absurd_size_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge")
    info.size = 1 << 50
    with pytest.raises((Invalid, NoResources)):
        convert_layers(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_a_sparse_file_of_terabytes_is_refused(tmp_path: Path) -> None:
    """GNU sparse: 512 bytes in the archive, 8 TiB when read."""
    info = tarfile.TarInfo("sparse")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"77777777000\0", b"00000001000\0"
    header[483:495] = b"\x80" + struct.pack(">xxxQ", 8 << 40)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises((Invalid, NoResources)):
        convert_layers(tmp_path, bytes(header) + bytes(512 + 1024))


@pytest.mark.parametrize("field", ["uid", "gid"])
def test_owners_out_of_range_are_refused(tmp_path: Path, field: str) -> None:
    for value in (-1, 1 << 32, (1 << 32) - 1):
        info, data = file("x")
        setattr(info, field, value)
        with pytest.raises(Invalid):
            convert_layers(tmp_path, layer((info, data)))


def test_an_unknown_kind_of_entry_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    data = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    data[156:157] = b"V"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    with pytest.raises(SupercloudError):
        convert_layers(tmp_path, bytes(data) + bytes(1024))


def test_a_damaged_header_amidst_a_layer_is_no_silent_end(tmp_path: Path) -> None:
    data = bytearray(layer(file("a"), file("b"), file("c")))
    data[512 + 148] ^= 0xFF
    with pytest.raises(Invalid):
        convert_layers(tmp_path, bytes(data))


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"x" * 4096, b"\x1f\x8b broken"])
def test_layers_that_are_no_tars_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Invalid):
        convert_layers(tmp_path, data)


def test_a_layer_swapped_for_another_is_refused(tmp_path: Path) -> None:
    """The manifest is consistent, but the config names another content."""
    honest, evil = layer(file("honest")), layer(file("evil"))

    class Swapped(Plain):
        def pack(self, data: bytes) -> tuple[bytes, str]:
            return evil, "tar"

    with pytest.raises(Invalid, match="not the one"):
        convert(Swapped(tmp_path / "l", [honest]).write(), cache=tmp_path / "cache", tools=TOOLS)


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../../../etc/passwd", "md5:0", "", "sha256:" + "A" * 64, "../x", 7, None],
)
def test_digests_are_no_paths(tmp_path: Path, digest: object) -> None:
    layout = Layout(tmp_path / "l", [layer()])
    entry = layout.manifest() | {"digest": digest}
    layout.index([entry])
    with pytest.raises((Invalid, Unsupported)):
        convert(f"oci:{tmp_path}/l", cache=tmp_path / "cache", tools=TOOLS)


def test_an_index_that_names_itself_ends(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l")
    entry = layout.blob(b'{"manifests": []}', "index")
    for _ in range(20):
        entry |= {"platform": {"os": "linux", "architecture": "amd64"}}
        entry = layout.blob(json.dumps({"manifests": [entry]}).encode(), "index")
    layout.index([entry])
    with pytest.raises(Invalid, match="nested"):
        convert(f"oci:{tmp_path}/l", cache=tmp_path / "cache", tools=TOOLS)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"manifests": 5}', '{"manifests": [5]}', "[" * 100_000, "\udcff", "null"],
)
def test_broken_indexes_are_refused(tmp_path: Path, index: str) -> None:
    Layout(tmp_path / "l", [layer()]).write()
    (tmp_path / "l/index.json").write_bytes(index.encode("utf-8", "surrogateescape"))
    with pytest.raises((Invalid, NotFound)):
        convert(f"oci:{tmp_path}/l", cache=tmp_path / "cache", tools=TOOLS)


def test_a_huge_manifest_is_not_read_whole(tmp_path: Path) -> None:
    Layout(tmp_path / "l", [layer()]).write()
    with (tmp_path / "l/index.json").open("wb") as out:
        out.truncate(1 << 40)
    with pytest.raises(NoResources):
        convert(f"oci:{tmp_path}/l", cache=tmp_path / "cache", tools=TOOLS)


def test_a_pipe_in_the_place_of_a_blob_blocks_nobody(tmp_path: Path) -> None:
    ref = Layout(tmp_path / "l", [layer(file("x"))]).write()
    for path in (tmp_path / "l/blobs/sha256").iterdir():
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(NotFound):
        convert(ref, cache=tmp_path / "cache", tools=TOOLS)


def test_docker_archives_that_point_elsewhere_are_refused(tmp_path: Path) -> None:
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"diff_ids": [sha256(b"")]},
        }
    ).encode()
    for name in ("/etc/passwd", "../../etc/passwd", "missing", "loop"):
        manifest = json.dumps([{"Config": "c.json", "Layers": [name]}]).encode()
        entries = [file("c.json", config), file("manifest.json", manifest), symlink("loop", "loop")]
        path = tmp_path / "image.tar"
        path.write_bytes(layer(*entries))
        with pytest.raises(Invalid, match="lacks"):
            convert(f"docker-archive:{path}", cache=tmp_path / "cache", tools=TOOLS)


def test_a_damaged_docker_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    docker_archive(path, [layer(file("x", os.urandom(2000)))])
    whole = path.read_bytes()
    for size in (0, 100, 511, 1500, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(Invalid):
            convert(f"docker-archive:{path}", cache=tmp_path / "cache", tools=TOOLS)


def test_nothing_is_left_in_the_cache_after_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(Invalid):
        convert_layers(tmp_path, layer(file("../x")))
    assert not list((tmp_path / "cache").glob(".convert-*"))
    assert not (tmp_path / "cache/erofs").exists()
