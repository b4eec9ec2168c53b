"""Objects that expire: what a lifecycle rule removes, and gives back to the quota.

weed looks for what is due five minutes after its start and then once a day. Nobody waits for that
here: its own shell makes the same pass at once, and time passes by what weed's metadata, which is
ours, says of when something was put.
"""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from supercloud.services.objects.entries import _fields
from supercloud.services.objects.weed import Ports
from support.object_store import MIB, WEED, ObjectStore, object_store

pytestmark = pytest.mark.root

DAY_S = 86_400
BODY = b"x" * 100_000
ATTRIBUTES = 4  # of weed's protocol buffer Entry


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("expiry")) as running:
        yield running


class Metadata:
    """What weed says to its metadata store, as weed says it."""

    def __init__(self, store: ObjectStore) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(f"{store.run}/store.sock")
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> "Metadata":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def call(self, *words: bytes) -> Any:
        parts = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self._socket.sendall(b"*%d\r\n%s" % (len(words), parts))
        return self._answer()

    def _answer(self) -> Any:
        line = self._file.readline().rstrip(b"\r\n")
        if line[:1] == b"$":
            return self._file.read(int(line[1:]) + 2)[:-2] if line != b"$-1" else None
        if line[:1] == b"*":
            return [self._answer() for _ in range(int(line[1:]))]
        assert line[:1] in b"+:", line
        return line

    def age(self, path: str, days: int) -> None:
        """As if it had been put so many days ago."""
        entry = self.call(b"GET", path.encode())
        attributes = dict(_fields(dict(_fields(entry))[ATTRIBUTES]))
        numbers = {value for value in attributes.values() if isinstance(value, int)}
        times = [value for value in numbers if 0 <= time.time() - value < DAY_S]
        assert times
        for put_s in times:
            entry = entry.replace(varint(put_s), varint(put_s - days * DAY_S))
        if since := re.search(rb"Noncurrent-Since-Ns\x12\x13([0-9]{19})", entry):
            older = int(since[1]) - days * DAY_S * 10**9
            entry = entry.replace(since[1], b"%d" % older)
        assert self.call(b"SET", path.encode(), entry) == b"+OK"

    def versions(self, path: str) -> list[str]:
        """Paths of the versions of an object."""
        place = f"{path}.versions"
        names = self.call(b"ZRANGEBYLEX", f"{place}\0".encode(), b"-", b"+")
        return [f"{place}/{name.decode()}" for name in names]


def varint(number: int) -> bytes:
    """As protocol buffers have it; as long for any time of our days."""
    made = b""
    while number > 127:
        made += bytes([number & 127 | 128])
        number >>= 7
    return made + bytes([number])


def look_for_what_is_due(store: ObjectStore) -> None:
    """One pass, in the network namespace that weed is in."""
    ports = Ports.shifted(store.shift)
    where = f"-s3 127.0.0.1:{ports.s3 + 10_000} -shards 0-15 -events 0 -runtime 60s"
    argv = ["nsenter", "-t", str(store.call("objects.state")["pid"]), "-n", WEED]
    argv += [f"-config_dir={store.run}", "shell", f"-master=127.0.0.1:{ports.master}"]
    argv += [f"-filer=127.0.0.1:{ports.filer}"]
    told = f"s3.lifecycle.run-shard {where}\nexit\n"
    done = subprocess.run(argv, input=told, capture_output=True, text=True, timeout=120, check=True)
    assert "complete" in done.stdout, (done.stdout, done.stderr)


def row(store: ObjectStore, name: str) -> Any:
    return next(row for row in store.call("bucket.list") if row["name"] == name)


def client(store: ObjectStore, name: str, **more: Any) -> Any:
    store.call("bucket.apply", {"name": name, "quota_bytes": 16 * MIB, **more})
    return store.client(store.credentials(f"user-{name}", {name: "write"}))


def keys(s3: Any, bucket: str) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_what_is_old_enough_goes_and_its_room_is_free_again(store: ObjectStore) -> None:
    aging, lasting = client(store, "aging", expire_days=7), client(store, "lasting")
    for key in ("of/yesterday", "of/last-week", "of/today"):
        aging.put_object(Bucket="aging", Key=key, Body=BODY)
    lasting.put_object(Bucket="lasting", Key="of/last-week", Body=BODY)
    with Metadata(store) as metadata:
        metadata.age("/buckets/aging/of/last-week", 8)
        metadata.age("/buckets/aging/of/yesterday", 1)
        metadata.age("/buckets/lasting/of/last-week", 800)
    look_for_what_is_due(store)
    assert keys(aging, "aging") == ["of/today", "of/yesterday"]
    assert keys(lasting, "lasting") == ["of/last-week"]
    assert row(store, "aging")["content_bytes"] == 2 * len(BODY)


def test_older_versions_go_and_the_newest_one_is_marked_as_deleted(store: ObjectStore) -> None:
    s3 = client(store, "versions", expire_days=7, versioning=True)
    for key in ("old", "old", "old", "new", "new"):
        s3.put_object(Bucket="versions", Key=key, Body=BODY)
    with Metadata(store) as metadata:
        for path in metadata.versions("/buckets/versions/old"):
            metadata.age(path, 20)
    look_for_what_is_due(store)
    assert keys(s3, "versions") == ["new"]
    listed = s3.list_object_versions(Bucket="versions")
    assert [version["Key"] for version in listed["Versions"]] == ["new", "new", "old"]
    assert [marker["Key"] for marker in listed["DeleteMarkers"]] == ["old"]
    assert row(store, "versions")["content_bytes"] == 3 * len(BODY)


def test_what_fell_due_while_nothing_ran_goes_after_the_next_start(store: ObjectStore) -> None:
    """Though weed's log, which it goes on reading where it was, does not say so."""
    s3 = client(store, "asleep", expire_days=7)
    s3.put_object(Bucket="asleep", Key="k", Body=BODY)
    look_for_what_is_due(store)
    assert keys(s3, "asleep") == ["k"]
    with Metadata(store) as metadata:
        metadata.age("/buckets/asleep/k", 8)
    store.stop()
    store.launch()
    store.start()
    look_for_what_is_due(store)
    s3 = client(store, "asleep", expire_days=7)
    assert keys(s3, "asleep") == []
    assert row(store, "asleep")["content_bytes"] == 0
