"""The build itself: equal products wherever, whenever and by whomever it is run."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supercloud.model.errors import NotFound, Permanent
from supercloud.model.images import L1_FILES, l1_digest
from supercloud.upper.platform.image import own, recipe, wheels
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.build import build
from supercloud.upper.platform.image.locking import Locking, for_build
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.tools import ToolTree, default_cache
from support.oci import extract, listing

SOURCE = Path(own.PACKAGE).parent
COLD_LIMIT_S = 60
NOBODY = 65534
PLAIN = ["setpriv", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


def fresh_cache(place: Path) -> Path:
    """A cache that has the packages and nothing else."""
    Locking(Archive(default_cache()), Progress(quiet=True)).obtain(for_build)
    (place / "debs").mkdir(parents=True)
    for deb in (default_cache() / "debs").glob("*.deb"):
        shutil.copyfile(deb, place / "debs" / deb.name)
    (place / wheels.PLACE).mkdir()
    wheels.tree(recipe.RUNTIME_WHEEL_FILES, default_cache())
    for file in recipe.RUNTIME_WHEEL_FILES:
        shutil.copyfile(
            default_cache() / wheels.PLACE / file.sha256, place / wheels.PLACE / file.sha256
        )
    for note in default_cache().glob("lock-instead-of-*"):
        shutil.copyfile(note, place / note.name)
    return place


def run_build(
    python: list[str], source: Path, cache: Path, out: Path, user: int = 0
) -> tuple[dict[str, Any], float]:
    """Run the command; its manifest and how many seconds of a processor it took."""
    command = [*python, "-m", "supercloud.upper.platform.image", "build", "--json"]
    command += ["--cache", str(cache), "--out", str(out)]
    begun_s = used_s()
    done = subprocess.run(
        [*PLAIN, f"--reuid={user}", f"--regid={user}", "env", f"PYTHONPATH={source}", *command],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), used_s() - begun_s


def used_s() -> float:
    """By our children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.root
@pytest.mark.timeout(600)
def test_two_cold_builds_are_equal_and_one_is_by_a_plain_user_with_another_python(
    open_place: Path,
) -> None:
    """As root with the image's Python 3.13, and as nobody with the host's."""
    source = open_place / "source"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    ours, theirs = open_place / "ours", open_place / "theirs"
    first, first_s = run_build(
        ToolTree().argv("python3.13"), source, fresh_cache(ours / "cache"), ours / "out"
    )
    fresh_cache(theirs / "cache")
    for place in (theirs, *(theirs / "cache" / part for part in ("", "debs", wheels.PLACE))):
        os.chown(place, NOBODY, NOBODY)
    second, second_s = run_build(
        ["/usr/bin/python3", "-B"], source, theirs / "cache", theirs / "out", NOBODY
    )
    assert first == second
    for name in first["files"]:
        assert (ours / "out" / name).read_bytes() == (theirs / "out" / name).read_bytes(), name
    assert max(first_s, second_s) < COLD_LIMIT_S


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The products of the code as it is now."""
    out = tmp_path_factory.mktemp("products")
    build(out, quiet=True)
    return out


def test_the_manifest_describes_the_files(products: Path) -> None:
    manifest = json.loads((products / "manifest.json").read_text())
    assert set(manifest["files"]) == {"runtime.erofs", *L1_FILES, "vmlinuz", "l1.qcow2"}
    hashes = {}
    for name, entry in manifest["files"].items():
        data = (products / name).read_bytes()
        listed = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True).stdout
        hashes[name] = entry["sha256"]
        assert entry["sha256"] == listed.split()[0].decode()
        assert entry["size_bytes"] == len(data)
    assert manifest["l1_digest"] == l1_digest(hashes)
    assert manifest["kernel"].startswith("6.")
    assert manifest["packages"]["qemu-system-x86"].startswith("1:10.")
    assert {path.name for path in products.iterdir()} == {"manifest.json", *manifest["files"]}


def test_a_second_build_changes_nothing_and_a_damaged_product_is_made_again(
    products: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in products.iterdir()}
    digest = json.loads((products / "manifest.json").read_text())["files"]["runtime.erofs"]
    build(products)
    assert "runtime.erofs is current" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in products.iterdir()}
    assert {n for n in before if before[n] != after[n]} <= {"manifest.json"}
    (products / "runtime.erofs").write_bytes(b"damaged")
    manifest = build(products, product="runtime", quiet=True)
    assert manifest["files"]["runtime.erofs"] == digest
    assert (products / "runtime.erofs").stat().st_size == digest["size_bytes"]


def test_the_runtime_image_has_what_a_domain_needs_and_nothing_privileged(
    products: Path, tmp_path: Path
) -> None:
    root = extract(products / "runtime.erofs", tmp_path / "root", ToolTree())
    found = listing(root)
    for name in ("proc", "dev", "tmp", "run", "sys", "var/lib", "etc", "opt/supercloud/main.py"):
        assert name in found
    for name in (
        "busybox",
        "passt",
        "passt.avx2",
        "qemu-system-x86_64",
        "swtpm",
        "openssl",
        "weed",
    ):
        assert f"usr/bin/{name}" in found
    assert f"{own.PLACE}/model/errors.pyc" in found
    assert not [name for name in found if name.startswith(own.PLACE) and name.endswith(".py")]
    assert not [
        name for name in found if name.startswith((f"{own.PLACE}/upper", f"{own.PLACE}/control"))
    ]
    for name in found:
        status = (root / name).lstat()
        assert not status.st_mode & 0o6000, name
        assert status.st_uid == status.st_gid == 0 or os.getuid() != 0, name


def run_in(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/sbin/chroot", root, *command],
        capture_output=True,
        text=True,
        check=False,
        env={},
    )


@pytest.mark.root
def test_programs_of_the_runtime_image_run_from_it(products: Path, tmp_path: Path) -> None:
    root = extract(products / "runtime.erofs", tmp_path / "root", ToolTree())
    python = ["/usr/bin/python3.13", "-I", "-S", "-B"]
    imports = "asyncio, ctypes, hashlib, http.client, json, logging, lzma, mmap, secrets, selectors"
    imports += ", socket, ssl, subprocess, tempfile, urllib.request, uuid, zlib, concurrent.futures"
    done = run_in(root, *python, "-c", f"import {imports}; print(ssl.OPENSSL_VERSION)")
    assert done.stdout.startswith("OpenSSL 3"), done.stderr
    for program in ("qemu-system-x86_64", "qemu-img", "qemu-storage-daemon", "swtpm", "mkfs.erofs"):
        done = run_in(root, f"/usr/bin/{program}", "--version")
        assert done.returncode == 0, (program, done.stderr)
    services = "import sys; sys.path.insert(0, '/opt/supercloud/lib')"
    services += "; import supercloud.services.objects.service"
    done = run_in(root, *python, "-c", services)
    assert done.returncode == 0, done.stderr
    assert "4.48" in run_in(root, "/usr/bin/weed", "version").stdout
    done = run_in(
        root,
        "/usr/bin/openssl",
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        "/tmp/k",
        "-subj",
        "/CN=x",
    )
    assert "BEGIN CERTIFICATE REQUEST" in done.stdout, done.stderr


@pytest.mark.root
def test_the_launcher_runs_modules_and_packages_and_says_what_is_missing(
    products: Path, tmp_path: Path
) -> None:
    root = extract(products / "runtime.erofs", tmp_path / "root", ToolTree())
    place = root / own.PLACE / "model"
    (place / "probe.py").write_text(
        "import sys\nfrom supercloud.model.errors import Invalid\n"
        "if __name__ == '__main__':\n    print(sys.argv[1:], __package__, Invalid.code)\n"
    )
    (place / "many").mkdir()
    (place / "many/__init__.py").write_text("")
    (place / "many/__main__.py").write_text("from . import __name__ as n\nprint(n)\n")
    launch = ["/usr/bin/python3.13", "-I", "-S", "-B", "/opt/supercloud/main.py"]
    done = run_in(root, *launch, "supercloud.model.probe", "a", "--b")
    assert done.stdout == "['a', '--b'] supercloud.model invalid\n", done.stderr
    done = run_in(root, *launch, "supercloud.model.many")
    assert done.stdout == "supercloud.model.many\n", done.stderr
    done = run_in(root, *launch, "supercloud.model.nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such module" in done.stderr


@pytest.mark.root
@pytest.mark.parametrize("image", ["runtime", "root"])
def test_what_the_services_need_beside_the_standard_library_is_there(
    products: Path, tmp_path: Path, image: str
) -> None:
    """A checkpoint is written and read back by the image's own Python and libraries."""
    root = extract(products / f"{image}.erofs", tmp_path / image, ToolTree())
    probe = root / own.PLACE / "services/probe.py"
    probe.write_text(
        "import io\n"
        "from supercloud.services.checkpoint.backend import Memory\n"
        "from supercloud.services.checkpoint.keys import Keys\n"
        "from supercloud.services.checkpoint.reader import Reader\n"
        "from supercloud.services.checkpoint.store import Store\n"
        "from supercloud.services.checkpoint.writer import Writer\n"
        "store = Store(Memory(), Keys(bytes(32), 'mine'))\n"
        "with Writer(store, 'web', 'qemu') as writer:\n"
        "    writer.write('memory', io.BytesIO(b'x' * 100_000).read)\n"
        "    head = writer.commit()\n"
        "print(Reader(store, store.open('web', head)).verify())\n"
        "store.close()\n"
    )
    launch = ["/usr/bin/python3.13", "-I", "-S", "-B", "/opt/supercloud/main.py"]
    done = run_in(root, *launch, "supercloud.services.probe")
    assert done.stdout == "100000\n", done.stderr


@pytest.mark.root
def test_every_module_of_ours_in_the_images_can_be_loaded_by_their_python(
    products: Path, tmp_path: Path
) -> None:
    """The bytecode's magic number is that of the image's Python, not of the builder's."""
    tools = ToolTree()
    for image, parts in (("runtime", recipe.OWN_RUNTIME), ("root", recipe.OWN_L1)):
        root = extract(products / f"{image}.erofs", tmp_path / image, tools)
        modules = [
            path.removeprefix("opt/supercloud/lib/").removesuffix(".py")
            for path in own.sources(parts)
            if path.endswith(".py")
        ]
        assert modules
        script = (
            "import marshal, sys\n"
            "from importlib.util import MAGIC_NUMBER\n"
            "for name in sys.argv[1:]:\n"
            "    data = open(f'/opt/supercloud/lib/{name}.pyc', 'rb').read()\n"
            "    assert data[:4] == MAGIC_NUMBER, name\n"
            "    marshal.loads(data[16:])\n"
        )
        done = run_in(root, "/usr/bin/python3.13", "-I", "-S", "-B", "-c", script, *modules)
        assert done.returncode == 0, done.stderr


@pytest.mark.root
def test_the_protection_engine_runs_in_both_images(products: Path, tmp_path: Path) -> None:
    """Compiled on the building host, it meets the image's C library and OpenSSL."""
    program = (
        "import os, sys\n"
        "sys.path.insert(0, '/opt/supercloud/lib')\n"
        "from supercloud.services.protection import engine, service\n"
        "size = 1 << 20\n"
        "file = os.memfd_create('backing')\n"
        "os.truncate(file, engine.backing_bytes(size))\n"
        "seal = engine.format_device(file, bytes(32), 'data', size)\n"
        "device = engine.Device(file, bytes(32), 'data', seal)\n"
        "device.serve(device.next_epoch)\n"
        "device.write(5, b'hello')\n"
        "seal = device.close()\n"
        "print(engine.Device(file, bytes(32), 'data', seal).read(4, 7))\n"
    )
    for image in ("runtime", "root"):
        root = extract(products / f"{image}.erofs", tmp_path / image, ToolTree())
        done = run_in(root, "/usr/bin/python3.13", "-I", "-S", "-B", "-c", program)
        assert (done.returncode, done.stdout) == (0, "b'\\x00hello\\x00'\n"), done.stderr
        assert not list(root.rglob("*.[ch]"))


def test_a_program_of_a_wheel_is_the_pinned_one_or_none(tmp_path: Path) -> None:
    (weed,) = recipe.RUNTIME_WHEEL_FILES
    (made,) = wheels.tree([weed], tmp_path).values()
    assert made.mode & 0o777 == 0o755
    kept = tmp_path / wheels.PLACE / weed.sha256
    kept.write_bytes(b"damaged")
    assert wheels.tree([weed], tmp_path)[weed.target].data == made.data
    assert kept.read_bytes() == made.data
    with pytest.raises(Permanent, match="not that of"):
        wheels.tree([replace(weed, sha256="0" * 64)], tmp_path)
    with pytest.raises(NotFound, match="not installed"):
        wheels.tree([replace(weed, distribution="none", sha256="0" * 64)], tmp_path)


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "supercloud.upper.platform.image", "build"]
    done = subprocess.run([*command, "--product", "nothing"], capture_output=True, check=False)
    assert done.returncode == 2
    done = subprocess.run(
        [*command, "--out", tmp_path / "out", "--cache", tmp_path / "cache"],
        env=os.environ | {"SUPERCLOUD_MIRROR_DEBIAN": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 10
    assert "error: http://127.0.0.1:9/pool/" in done.stderr
