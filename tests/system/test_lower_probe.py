"""The probe of the accelerator, with the real runtime image and kernel."""

import contextlib
import json
import os

import pytest

from supercloud.lower.host import images as host_images
from supercloud.lower.vmm import probe as probes
from support.lower import images

pytestmark = [pytest.mark.root, pytest.mark.vm]
UID, OWNER = 2_900_000, 2_901_000


@pytest.fixture
def kernel(vm_lock: None) -> int:
    return host_images.sealed(str(images() / "vmlinux"), "kernel")


def probe(kernel: int) -> probes.Accelerator:
    described = json.loads((images() / "manifest.json").read_text())["files"]["runtime.erofs"]
    path = str(images() / "runtime.erofs")
    return probes.probe(path, described["sha256"], kernel, UID, OWNER)


def mine() -> list[str]:
    """Processes of the probe's uid."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.stat(f"/proc/{pid}").st_uid == UID:
                found.append(pid)
    return found


def test_kvm_is_used_only_where_a_guest_comes_up(kernel: int) -> None:
    found = probe(kernel)
    if found.name == "tcg":
        assert found.reason  # a person can read why
    assert (found.name == "kvm") is (found.reason == "")
    assert mine() == []


def test_a_guest_that_comes_up_is_recognized(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ACCELERATION", ("-accel", "tcg", "-cpu", "max"))
    monkeypatch.setattr(probes, "PATIENCE_S", 60.0)
    assert probe(kernel) == probes.Accelerator("kvm", "")
    assert mine() == []


def test_a_guest_that_hangs_is_given_up_and_killed(
    kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "ACCELERATION", ("-S", "-accel", "tcg", "-cpu", "max"))
    monkeypatch.setattr(probes, "PATIENCE_S", 0.5)
    found = probe(kernel)
    assert found.name == "tcg"
    assert "was not up within 0.5 s" in found.reason
    assert mine() == []


def test_no_device_is_a_reason(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "KVM", "/dev/no-such-device")
    assert probe(kernel) == probes.Accelerator("tcg", "/dev/no-such-device is not there")
