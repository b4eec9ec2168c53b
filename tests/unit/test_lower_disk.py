"""The disk driver where the provider's file system refuses what the quota allows."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.provider import disk as module
from supercloud.lower.provider.disk import DiskDriver
from supercloud.model.errors import NoResources
from supercloud.wire.portal import Reply, Request

MIB = 1 << 20


class Core:
    def __init__(self) -> None:
        self.booked = 0

    def lookup(self, _name: str) -> Any:
        return SimpleNamespace(selector=1)

    def usage(self, _context: int) -> Any:
        return SimpleNamespace(booked_disk_bytes=self.booked)

    def charge(self, _context: int, more: int) -> None:
        self.booked += more


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskDriver:
    monkeypatch.setattr(module, "STATE", str(tmp_path))
    core: Any = Core()
    made = DiskDriver(core)
    made.channels["user:u"] = None  # type: ignore[assignment]
    return made


def asked(method: str, size_bytes: int = MIB) -> Request:
    return Request("user:u", method, {"use": "volume", "name": "v", "size_bytes": size_bytes})


def files(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in directory.glob("*/*")}


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, function, refused)


@pytest.mark.parametrize(
    ("function", "number"), [("open", errno.ENOSPC), ("ftruncate", errno.EFBIG)]
)
def test_a_file_that_cannot_be_made_is_neither_there_nor_booked(
    driver: DiskDriver, tmp_path: Path, function: str, number: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, function, number)
        with pytest.raises(NoResources, match="provider"):
            driver.create(asked("disk.create"))
    assert files(tmp_path) == {}
    assert driver.core.usage(1).booked_disk_bytes == 0
    reply: Reply = driver.create(asked("disk.create"))
    os.close(reply.descriptors[0])
    assert driver.core.usage(1).booked_disk_bytes == MIB


def test_one_that_cannot_grow_is_what_it_was(driver: DiskDriver, tmp_path: Path) -> None:
    os.close(driver.create(asked("disk.create")).descriptors[0])
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, "truncate", errno.EFBIG)
        with pytest.raises(NoResources, match="provider"):
            driver.grow(asked("disk.grow", 2 * MIB))
    assert files(tmp_path) == {f"volume:v.{MIB}": MIB}
    assert driver.core.usage(1).booked_disk_bytes == MIB
    driver.grow(asked("disk.grow", 2 * MIB))
    assert files(tmp_path) == {f"volume:v.{2 * MIB}": 2 * MIB}


def test_a_file_that_cannot_be_cut_back_does_not_end_the_driver(
    driver: DiskDriver, tmp_path: Path
) -> None:
    descriptor = driver.create(asked("disk.create")).descriptors[0]
    os.ftruncate(descriptor, 3 * MIB)
    os.close(descriptor)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, "truncate", errno.EFBIG)
        driver._cut_back()
    driver._cut_back()
    assert files(tmp_path) == {f"volume:v.{MIB}": MIB}


def test_what_is_stored_goes_with_the_user_and_not_with_a_domain_of_the_users(
    driver: DiskDriver, tmp_path: Path
) -> None:
    driver.create(asked("disk.create"))
    driver.lost("user:u")  # as when a user's domain could not be equipped at the host's start
    assert list(files(tmp_path).values()) == [MIB]
    forget = Request("multiplexing", "user.forget", {"user": "u"})
    assert driver.forget(forget) == {}
    assert files(tmp_path) == {}
    assert driver.forget(forget) == {}
