"""A provider's disk that is full: writers wait, reads go on, and nothing is lost."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from supercloud.model.errors import NoResources
from supercloud.services.protection.engine import Device, backing_bytes
from support.commandline import wait_for
from support.protected_nbd import DISC, FLUSH, FUA, READ, TRIM, WRITE, ZEROES, Client
from support.protection import BLOCK, KEY, NAME, content
from support.small_disk import SmallDevice, SmallDisk, small_disk

pytestmark = [pytest.mark.root]

MIB = 1 << 20
SIZE = 32 * MIB
ENOSPC = 28


class Small(SmallDevice):
    """A device on a disk that has room for some of it, and that is full."""

    def __init__(self, disk: SmallDisk) -> None:
        super().__init__(disk, SIZE)
        self.client = Client(self.device).go()
        self.old = content(1, 10)
        assert self.client.call(WRITE, 0, data=self.old, flags=FUA)[0] == 0
        disk.fill()

    def opened(self) -> Device:
        device = Device(self.file, KEY, NAME, self.seal)
        self.seal = replace(self.seal, epoch=device.next_epoch)  # no epoch is used twice
        try:
            self.seal = device.serve(device.next_epoch)
        except NoResources:
            device.close(commit=False)
            raise
        return device

    def again(self) -> Device:
        """As after a crash: what was not made durable is not there."""
        self.device.close(commit=False)
        self.disk.make_room()
        self.device = self.opened()
        return self.device

    def kinds(self) -> list[str]:
        return [found.kind for found in self.device.evidence()]

    @contextlib.contextmanager
    def sending(self, *requests: tuple[Any, ...]) -> Iterator[None]:
        """More than fits in the socket, by and by."""

        def send() -> None:
            with contextlib.suppress(OSError):
                for request in requests:
                    self.client.send(*request)

        sender = threading.Thread(target=send)
        sender.start()
        yield
        sender.join()

    def wait_until_full(self) -> None:
        wait_for(lambda: self.is_full, 60)

    def close(self) -> None:
        self.client.close()
        super().close()


@pytest.fixture
def small() -> Iterator[Small]:
    with small_disk(24 * MIB) as disk:
        made = Small(disk)
        yield made
        made.close()


def is_silent(client: Client) -> bool:
    """Nothing has come from the device, though it was given several turns."""
    client.sock.settimeout(1)
    try:
        client.sock.recv(1)
    except TimeoutError:
        return True
    finally:
        client.sock.settimeout(60)
    return False


def test_a_writer_waits_and_goes_on_when_there_is_room(small: Small) -> None:
    new = content(2, 200)
    small.client.send(WRITE, MIB, len(new), new, FUA)
    small.wait_until_full()
    assert is_silent(small.client)
    small.disk.make_room()
    assert small.client.reply()[0] == 0
    wait_for(lambda: not small.is_full, 60)
    assert small.kinds() == ["space", "room"]
    again = small.again()
    assert again.read(MIB, len(new)) == new
    assert again.read(0, len(small.old)) == small.old


def test_reads_go_on_meanwhile(small: Small) -> None:
    new = content(2, 200)
    small.client.send(WRITE, MIB, len(new), new)
    small.wait_until_full()
    for _ in range(20):
        assert small.client.call(READ, 0, len(small.old)) == (0, small.old)
    other = Client(small.device).go()
    assert other.call(READ, BLOCK, BLOCK) == (0, small.old[BLOCK : 2 * BLOCK])
    other.close()
    small.disk.make_room()
    assert small.client.reply()[0] == 0


@pytest.mark.parametrize("count", [8, 300])
def test_many_writers_and_flushes_wait_and_all_is_there(small: Small, count: int) -> None:
    """More than the connection has threads; what was answered is durable."""
    writes = [
        (WRITE, MIB + number * 8 * BLOCK, 8 * BLOCK, content(number, 8)) for number in range(count)
    ]
    flushes = [(FLUSH,)] * 4
    with small.sending(*writes[:4], *flushes, *writes[4:]):
        small.wait_until_full()
        small.disk.make_room()
        for _ in range(count + 4):
            assert small.client.reply()[0] == 0
    assert small.client.call(FLUSH)[0] == 0
    again = small.again()
    for number in range(count):
        assert again.read(MIB + number * 8 * BLOCK, 8 * BLOCK) == content(number, 8)


def test_a_write_larger_than_a_piece_waits(small: Small) -> None:
    new = content(5, 3 * MIB // BLOCK)
    with small.sending((WRITE, 4 * MIB, len(new), new, FUA)):
        small.wait_until_full()
        small.disk.make_room()
    assert small.client.reply()[0] == 0
    assert small.again().read(4 * MIB, len(new)) == new


def test_zeroes_and_trims_that_find_no_room_wait(small: Small) -> None:
    other = Client(small.device).go()
    other.send(WRITE, 8 * MIB, 16 * BLOCK, content(9, 16))  # takes what may be left over
    small.wait_until_full()
    small.client.send(ZEROES, 100, 2 * BLOCK)  # its edges are written
    small.disk.make_room()
    assert (small.client.reply()[0], other.reply()[0]) == (0, 0)
    assert small.client.call(TRIM, 4 * BLOCK, BLOCK, flags=FUA)[0] == 0
    expected = small.old[:100] + bytes(2 * BLOCK) + small.old[2 * BLOCK + 100 : 4 * BLOCK]
    again = small.again()
    assert again.read(0, 5 * BLOCK) == expected + bytes(BLOCK)
    other.close()


def test_not_held_it_is_refused_and_so_is_what_waits(small: Small) -> None:
    small.client.send(WRITE, MIB, 200 * BLOCK, content(2, 200))
    small.wait_until_full()
    small.device.hold(False)
    assert small.client.reply()[0] == ENOSPC
    assert small.client.call(WRITE, MIB, data=content(2, 200))[0] == ENOSPC
    assert small.client.call(READ, 0, BLOCK) == (0, small.old[:BLOCK])


def test_what_lies_behind_the_end_is_refused_at_once(small: Small) -> None:
    assert small.client.call(WRITE, SIZE, data=content(1))[0] == ENOSPC


def test_our_own_calls_do_not_wait(small: Small) -> None:
    small.client.send(WRITE, MIB, 200 * BLOCK, content(2, 200))
    small.wait_until_full()
    with pytest.raises(NoResources, match="full"):
        small.device.write(8 * MIB, content(3, 200))
    with pytest.raises(NoResources, match="full"):
        while True:  # a page of the tree or a record finds no room at some time
            small.device.zero(0, BLOCK)
            small.device.flush()


@pytest.mark.parametrize("pieces", [1, 3])
def test_it_closes_while_requests_wait_and_keeps_what_was_durable(
    small: Small, pieces: int
) -> None:
    data = content(2, pieces * MIB // BLOCK)
    with small.sending((WRITE, 4 * MIB, len(data), data), (FLUSH,)):
        small.wait_until_full()
        small.device.close(commit=False)
        with pytest.raises(NoResources, match="full"):
            small.opened()
        again = small.again()
    assert again.read(0, len(small.old)) == small.old


def test_it_closes_in_order_on_a_full_disk_when_all_was_durable(small: Small) -> None:
    small.client.send(WRITE, MIB, 200 * BLOCK, content(2, 200))
    small.wait_until_full()
    small.device.hold(False)
    assert small.client.reply()[0] == ENOSPC
    kept = small.device.close()
    assert kept is not None
    small.seal = replace(kept, epoch=small.seal.epoch)
    small.disk.make_room()
    small.device = small.opened()
    assert small.device.read(0, len(small.old)) == small.old


@pytest.mark.parametrize("said", [True, False])
def test_a_client_that_goes_takes_along_what_waits(small: Small, said: bool) -> None:
    for number in range(4 if said else 7):
        small.client.send(WRITE, MIB + number * MIB, 8 * BLOCK, content(2, 8))
    small.wait_until_full()
    if said:
        small.client.send(DISC)
    small.client.close()
    wait_for(lambda: not small.device.figures()["connections"], 60)
    wait_for(lambda: not small.is_full or small.device.figures()["uncommitted"], 60)
    small.client = Client(small.device).go()
    assert small.client.call(READ, 0, BLOCK) == (0, small.old[:BLOCK])


def test_a_device_grows_or_not_while_requests_wait(small: Small) -> None:
    small.client.send(WRITE, MIB, 200 * BLOCK, content(2, 200))
    small.wait_until_full()
    os.truncate(small.disk.path / "backing", backing_bytes(2 * SIZE))
    try:
        small.device.grow(2 * SIZE)
    except NoResources:
        small.disk.make_room()
        small.device.flush(checkpoint=True)
    small.disk.make_room()
    assert small.client.reply()[0] == 0
    assert small.device.figures()["blocks"] * BLOCK == 2 * SIZE
    assert small.device.read(MIB, 200 * BLOCK) == content(2, 200)
