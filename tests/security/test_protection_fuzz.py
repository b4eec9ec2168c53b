"""Random clients: whatever they send, the device stays right for others."""

import contextlib
import random
import socket
import struct

import pytest

from support.protected_nbd import READ, WRITE, Client
from support.protection import BLOCK, content, new_disk, prepared

SIZE = 1 << 20
OPTIONS = (1, 2, 3, 5, 6, 7, 8, 9, 10, 0, 1 << 31)


def option(rnd: random.Random) -> bytes:
    """An option that is nearly right."""
    name = rnd.choice([b"", b"x" * rnd.randrange(40)])
    query = rnd.choice([b"base:allocation", b"base:", b"other:x", rnd.randbytes(9)])
    length = rnd.choice([len(query), len(query), rnd.getrandbits(32)])
    body = rnd.choice([
        b"", rnd.randbytes(rnd.randrange(60)),
        struct.pack(">I", rnd.choice([len(name), rnd.getrandbits(32)])) + name + struct.pack(">H", 0),
        struct.pack(">I", len(name)) + name + struct.pack(">II", rnd.choice([0, 1, 1 << 31]), length) + query,
    ])  # fmt: skip
    size = rnd.choice([len(body)] * 9 + [rnd.getrandbits(32)])
    return struct.pack(">QII", 0x49484156454F5054, rnd.choice(OPTIONS), size) + body


def request(rnd: random.Random) -> bytes:
    """A request that is nearly right; it keeps off the first block."""
    kind = (
        rnd.choice([0, 1, 1, 2, 3, 4, 5, 6, 7, rnd.getrandbits(16)]) if rnd.random() < 0.97 else 2
    )
    offset = rnd.choice(
        [rnd.randrange(BLOCK, SIZE), SIZE - 1, 1 << 63, rnd.getrandbits(64) | BLOCK]
    )
    length = rnd.choice([0, 1, 512, BLOCK, 10000, 300000, rnd.getrandbits(32)])
    magic = 0x25609513 if rnd.random() < 0.97 else rnd.getrandbits(32)
    head = struct.pack(">IHHQQI", magic, rnd.choice([0, 1, 8, 0xFFFF]), kind, 0, offset, length)
    return head + (rnd.randbytes(min(length, 400000)) if kind == WRITE else b"")


@pytest.mark.parametrize("seed", range(12))
def test_random_clients_hurt_nobody(seed: int) -> None:
    rnd = random.Random(seed)
    disk, seal = new_disk(SIZE)
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    device.write(0, content(7))
    polite = Client(device).go()
    for _ in range(25):
        sock, theirs = socket.socketpair()
        device.connect(theirs.detach())
        sock.settimeout(0.02)
        with contextlib.suppress(OSError):
            sock.sendall(struct.pack(">I", rnd.choice([3, 3, 3, 1, rnd.getrandbits(32)])))
            for _ in range(rnd.randrange(5)):
                sock.sendall(option(rnd))
            if rnd.random() < 0.8:
                sock.sendall(struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0))
            for _ in range(rnd.randrange(12)):
                sock.sendall(request(rnd))
                with contextlib.suppress(TimeoutError):
                    sock.recv(1 << 16)
        sock.close()
        assert polite.call(READ, 0, BLOCK) == (0, content(7))
        while device.figures()["connections"] > 1:
            pass
    polite.close()
    kept = device.close()
    assert kept is not None
    again = prepared(disk, kept)
    assert again.read(0, BLOCK) == content(7)
    assert again.figures()["damaged"] == 0
    again.close(commit=False)
