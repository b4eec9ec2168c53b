"""Layers against a model that replays them the slow way, and against random damage."""

import contextlib
import io
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import SupercloudError
from supercloud.upper.environments.layers import Directory, merge, walk
from supercloud.upper.environments.limits import Limits
from support.oci import directory, file, layer

NAMES = st.sampled_from("abc")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["file", "dir", "whiteout", "opaque"]), PATHS), max_size=8
)


def parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def legal(operations: list[tuple[str, str]], below: dict[str, str]) -> list[tuple[str, str]]:
    """Those that an honest tool would write: no path both file and directory in one layer, no
    whiteout of what the layer itself makes, none below a file."""
    kinds: dict[str, str] = {}
    kept: list[tuple[str, str]] = []
    for kind, path in operations:
        wanted = dict.fromkeys(parents(path), "dir")
        if kind in {"file", "dir"}:
            wanted[path] = kind
        if kind == "opaque":
            wanted[path] = "dir"
        if any(kinds.get(name, want) != want for name, want in wanted.items()):
            continue
        if any(below.get(name, "dir") != "dir" for name in [*parents(path)]):
            continue
        if kind == "opaque" and below.get(path, "dir") != "dir":
            continue
        if kind == "whiteout" and path in kinds:
            continue
        if any(op == "whiteout" and (p == path or path.startswith(p + "/")) for op, p in kept):
            continue
        kinds |= wanted
        kept.append((kind, path))
    return kept


def replay(below: dict[str, str], operations: list[tuple[str, str]]) -> dict[str, str]:
    """First everything that hides, then everything that makes."""
    tree = dict(below)

    def drop(path: str, *, itself: bool) -> None:
        for name in list(tree):
            if name.startswith(path + "/") or (itself and name == path):
                del tree[name]

    for kind, path in operations:
        if kind in {"whiteout", "opaque"}:
            drop(path, itself=kind == "whiteout")
    for kind, path in operations:
        if kind in {"file", "dir"}:
            tree |= dict.fromkeys(parents(path), "dir")
            if kind == "file":
                drop(path, itself=True)
            tree[path] = kind
    return tree


def as_tar(operations: list[tuple[str, str]]) -> bytes:
    entries = []
    for kind, path in operations:
        place, _, name = path.rpartition("/")
        if kind == "file":
            entries.append(file(path))
        elif kind == "dir":
            entries.append(directory(path))
        elif kind == "opaque":
            entries.append(file(f"{path}/.wh..wh..opq"))
        else:
            entries.append(file(f"{place}/.wh.{name}" if place else f".wh.{name}"))
    return layer(*entries)


def merged(*layers: bytes) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        paths = []
        for number, data in enumerate(layers):
            paths.append(Path(scratch) / f"{number}.tar")
            paths[-1].write_bytes(data)
        with merge(paths, Limits(), where="test") as root:
            return {
                path: "dir" if isinstance(node, Directory) else "file" for path, node in walk(root)
            }


@settings(deadline=None, max_examples=300)
@given(st.lists(OPERATIONS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_layers_merge_as_the_model_says_in_any_order_of_entries(layers, random) -> None:  # type: ignore[no-untyped-def]
    expected: dict[str, str] = {}
    tars = []
    for operations in layers:
        kept = legal(operations, expected)
        expected = replay(expected, kept)
        random.shuffle(kept)
        tars.append(as_tar(kept))
    assert merged(*tars) == expected


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_is_refused_or_harmless_but_never_a_crash(data: st.DataObject) -> None:
    long = file("n" * 150, b"x" * 700, xattrs={"user.a": "b"})
    whole = bytearray(layer(directory("d"), file("d/x", b"y" * 600), long))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    with contextlib.suppress(SupercloudError):
        merged(bytes(whole[:cut]))


def test_a_layer_of_many_entries_takes_little_memory_and_time() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(20_000):
            tar.addfile(tarfile.TarInfo(f"{number % 100}/{number}"))
            tar.members.clear()
    assert len(merged(out.getvalue())) == 20_100
