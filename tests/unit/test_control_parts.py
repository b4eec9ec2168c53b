"""Small parts of the control plane: boot data, images, conversion, settings, steps, specs."""

import asyncio
import io
import json
import os
import stat

import pytest

from supercloud.control import convert, settings
from supercloud.control.bootdata import config_iso, user_data
from supercloud.control.documents import Step, step_begin, step_end
from supercloud.control.images import Images, kernel_files, mark_of
from supercloud.control.plan import size_text
from supercloud.model.errors import BadState, Invalid, NotFound, Permanent
from supercloud.model.resources import Environment
from supercloud.model.states import ENVIRONMENT, observed
from support.control import convert as pretended
from support.control import write_images


def vm(path):
    return Environment(name="v", kind="vm", image=str(path))


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images")
    return Images(tmp_path / "cache", pretended)


def prepare(images, environment, seen=None):
    told = (seen if seen is not None else []).append
    mark = mark_of(environment.image)
    return asyncio.run(images.prepare(environment, mark, told))


# -- boot data


def test_the_config_disk_is_a_config_2_disk_with_both_files():
    import pycdlib

    user = user_data("cloud", "platform-1", "t" * 64, "PEM", ["169.254.77.1:7444"])
    image = config_iso("cloud", "platform-1", user)
    assert image[0x8000 + 40 : 0x8000 + 48] == b"config-2"
    assert len(image) <= 1 << 20
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(image))
    for kind in ("rr_path", "joliet_path"):
        out = io.BytesIO()
        iso.get_file_from_iso_fp(out, **{kind: "/openstack/latest/user_data"})
        data = json.loads(out.getvalue())
        assert data == {
            "version": 1, "ucloud": "cloud", "platform": "platform-1", "token": "t" * 64,
            "ca_pem": "PEM", "server_name": "control.control.cloud.supercloud.internal",
            "endpoints": ["169.254.77.1:7444"], "uplink": "dhcp",
        }  # fmt: skip
        out = io.BytesIO()
        iso.get_file_from_iso_fp(out, **{kind: "/openstack/latest/meta_data.json"})
        meta = json.loads(out.getvalue())
        assert meta["hostname"] == "platform-1"
        assert len(meta["uuid"]) == 32


# -- images


def test_kernel_and_initrd_become_blobs_by_their_hash(images, tmp_path):
    image = prepare(images, vm(tmp_path / "images" / "vm"))
    assert (image.format, set(image.blobs)) == ("kernel", {"kernel", "initrd"})
    for role, blob in image.blobs.items():
        assert images.blob(blob.digest).read_bytes() == role.encode()
        assert blob.size_bytes == len(role)
    assert images.complete(image)


def test_kernel_and_initrd_are_packed_into_one_blob_once(tmp_path):
    made = []

    def pack(files, out):
        made.append({name: path.read_bytes() for name, path in files.items()})
        out.write_bytes(b"erofs")

    write_images(tmp_path / "images")
    directory = vm(tmp_path / "images" / "vm")
    for _ in range(2):  # and after a restart
        images = Images(tmp_path / "packed", pretended, pack)
        image = prepare(images, directory)
    assert made == [{"kernel": b"kernel", "initrd": b"initrd"}]
    blob = image.blobs["root"]
    assert (images.blob(blob.digest).read_bytes(), blob.size_bytes) == (b"erofs", 5)
    assert images.complete(image)


def test_disks_are_told_apart_by_their_first_bytes(images, tmp_path):
    raw, qcow2 = tmp_path / "disk.qcow2", tmp_path / "disk.raw"  # names say nothing
    raw.write_bytes(b"\0" * 5000)
    qcow2.write_bytes(b"QFI\xfb" + b"\0" * 5000)
    assert prepare(images, vm(raw)).format == "raw"
    assert prepare(images, vm(qcow2)).format == "qcow2"


def test_a_file_is_hashed_once_and_again_when_it_changed(images, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"\0" * 5000)
    seen = []
    first = prepare(images, vm(disk), seen)
    assert seen[-1] == 1.0
    again = []
    fresh = Images(tmp_path / "cache", pretended)  # after a restart
    assert prepare(fresh, vm(disk), again) == first
    assert again == []
    disk.write_bytes(b"\1" * 5000)
    assert prepare(fresh, vm(disk)) != first


def test_what_runs_is_what_was_hashed_even_when_the_file_changes_later(images, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"good")
    blob = prepare(images, vm(disk)).blobs["disk"]
    disk.write_bytes(b"evil")
    assert images.blob(blob.digest).read_bytes() == b"good"


def test_image_json_names_the_files_beside_it_only(tmp_path):
    (tmp_path / "k").write_bytes(b"")
    (tmp_path / "i").write_bytes(b"")
    described = tmp_path / "image.json"
    described.write_text(json.dumps({"kernel": "k", "initrd": "i", "append": "quiet"}))
    named = {"kernel": "k", "initrd": "i", "append": "quiet"}
    assert kernel_files(tmp_path) == named | {"identity": ""}
    described.write_text(json.dumps(named | {"identity": True}))
    assert kernel_files(tmp_path) == named | {"identity": "yes"}
    for bad in (
        {"kernel": "../k"},
        {"kernel": "/etc/passwd"},
        {"initrd": 7},
        {"append": "x" * 5000},
    ):
        described.write_text(json.dumps({"kernel": "k", "initrd": "i"} | bad))
        with pytest.raises(Invalid):
            kernel_files(tmp_path)
    described.write_text("no json")
    with pytest.raises(Invalid):
        kernel_files(tmp_path)
    described.write_text(json.dumps({"kernel": "k", "initrd": "missing"}))
    with pytest.raises(NotFound, match="missing"):
        kernel_files(tmp_path)


def test_marks_change_with_the_content_and_only_then(tmp_path):
    write_images(tmp_path)
    references = [f"oci:{tmp_path}/web", f"{tmp_path}/vm"]
    before = [mark_of(item) for item in references]
    assert before == [mark_of(item) for item in references]
    assert all(before)
    (tmp_path / "web" / "index.json").write_text('{"other": 1}')
    (tmp_path / "vm" / "initrd").write_bytes(b"other")
    assert not set(before) & {mark_of(item) for item in references}
    assert mark_of("docker://registry/web:1") == ""
    with pytest.raises(NotFound):
        mark_of(f"oci:{tmp_path}/nothing")
    with pytest.raises(NotFound):
        mark_of(f"{tmp_path}/nothing")


def test_a_damaged_note_of_hashes_is_only_a_lost_cache(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "known.json").write_text("rubbish")
    images = Images(tmp_path / "cache", pretended)
    assert prepare(images, vm(tmp_path / "images" / "vm"))


def test_the_converters_process_hands_over_results_and_errors(tmp_path):
    write_images(tmp_path)
    made = convert.in_process(f"oci:{tmp_path}/web", tmp_path / "cache")
    assert made.process.argv == ["/serve"]
    assert os.path.getsize(made.path) == made.size_bytes
    assert made == convert.in_process(f"oci:{tmp_path}/web", tmp_path / "cache")
    with pytest.raises(NotFound):
        convert.in_process(f"oci:{tmp_path}/nothing", tmp_path / "cache")


def test_a_converter_that_dies_is_an_error_with_what_it_said(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.sys, "executable", "/bin/false")
    with pytest.raises(Permanent, match="ended with 1"):
        convert.in_process("oci:x", tmp_path)


# -- settings


def test_settings_come_from_arguments_then_environment_then_home():
    given = settings.parse([], {"HOME": "/home/me"})
    assert str(given.state) == "/home/me/.local/state/supercloud"
    assert str(given.cache) == "/home/me/.cache/supercloud"
    assert str(given.socket) == "/run/supercloud/api.sock"
    assert given.address == ("127.0.0.1", 7444)
    xdg = {"XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c", "XDG_RUNTIME_DIR": "/r"}
    given = settings.parse([], xdg)
    assert (str(given.state), str(given.cache)) == ("/s/supercloud", "/c/supercloud")
    assert str(given.socket) == "/r/supercloud/api.sock"
    given = settings.parse(
        ["--state", "/x", "--socket", "/y", "--listen", "[::1]:5", "--log", "-"],
        xdg | {"SUPERCLOUD_SOCKET": "/z"},
    )
    assert (str(given.state), str(given.socket), given.log) == ("/x", "/y", None)
    assert given.address == ("::1", 5)
    assert settings.parse(["--listen", ""], xdg).address is None
    assert str(settings.parse([], xdg | {"SUPERCLOUD_SOCKET": "/z"}).socket) == "/z"


@pytest.mark.parametrize("listen", ["7444", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", ":1"])
def test_a_bad_address_is_invalid(listen):
    with pytest.raises(Invalid):
        _ = settings.parse(["--listen", listen], {"HOME": "/h"}).address


def test_without_any_home_it_says_what_to_give():
    with pytest.raises(Invalid, match="XDG_STATE_HOME"):
        settings.parse([], {})


# -- steps, states, texts


def test_a_step_that_begins_again_is_one_step():
    steps = []
    step_begin(steps, "image")
    first = steps[0].started_s
    step_begin(steps, "image")
    assert [step.started_s for step in steps] == [first]
    step_end(steps, "image", "broken")
    assert steps[0].error == "broken"
    step_end(steps, "image")  # it is over: nothing changes
    assert steps[0].error == "broken"
    step_begin(steps, "image")
    assert steps == [Step(name="image", started_s=steps[0].started_s)]


def test_what_is_observed_may_skip_states_but_not_come_back_from_the_dead():
    assert observed(ENVIRONMENT, "placed", "serving") == "serving"
    assert observed(ENVIRONMENT, "serving", "serving") == "serving"
    with pytest.raises(BadState):
        observed(ENVIRONMENT, "gone", "serving")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1024, "1KiB"),
        (1 << 20, "1MiB"),
        (3 << 30, "3GiB"),
        ((1 << 30) + 1, "1073741825B"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_that_divides_them(size, text):
    assert size_text(size) == text


def test_a_blob_file_is_not_for_others(images, tmp_path):
    prepare(images, vm(tmp_path / "images" / "vm"))
    assert stat.S_IMODE((tmp_path / "cache" / "blobs" / "sha256").stat().st_mode) == 0o700
