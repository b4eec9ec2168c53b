"""What every backend of checkpoints keeps to: in memory, a directory, and a real S3 server."""

import dataclasses
import io
import itertools
import os
import random
import threading

import pytest

from supercloud.model.errors import Denied, Exists, Invalid, NotFound, Permanent
from supercloud.services.checkpoint.backend import Item, Memory
from supercloud.services.checkpoint.collect import Keep, collect
from supercloud.services.checkpoint.directory import Directory
from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.reader import Reader
from supercloud.services.checkpoint.retention import Retention
from supercloud.services.checkpoint.s3 import S3
from supercloud.services.checkpoint.store import Store
from supercloud.services.checkpoint.writer import Writer
from support.s3_server import s3_server

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture(params=["memory", "directory", "s3"])
def backend(request, tmp_path):
    if request.param == "memory":
        yield Memory()
    elif request.param == "directory":
        yield Directory(tmp_path)
    else:
        own = f"test-{next(_prefixes)}/"
        made = S3(dataclasses.replace(request.getfixturevalue("bucket"), prefix=own))
        yield made
        made.close()


def test_an_object_is_read_as_it_was_put_whole_and_in_ranges(backend):
    data = os.urandom(300_000)
    backend.put("packs/a-1", data)
    backend.put("packs/b", bytearray(b""))
    assert backend.get("packs/a-1") == data
    assert backend.get("packs/a-1", 1000, 70_000) == data[1000:71_000]
    assert backend.get("packs/a-1", 299_990) == data[-10:]
    assert backend.get("packs/b") == b""


def test_a_range_beyond_the_end_is_what_there_is(backend):
    backend.put("packs/a", b"0123456789")
    assert backend.get("packs/a", 8, 100) == b"89"
    assert backend.get("packs/a", 10, 5) == b""
    assert backend.get("packs/a", 50, 5) == b""
    assert backend.get("packs/a", 3, 0) == b""


def test_a_taken_key_is_refused_and_its_object_stays(backend):
    backend.put("manifests/1", b"first")
    for again in (b"second", b"first"):
        with pytest.raises(Exists):
            backend.put("manifests/1", again)
    assert backend.get("manifests/1") == b"first"


def test_of_many_puts_of_one_key_at_the_same_time_exactly_one_wins(backend):
    outcomes, start = {}, threading.Barrier(6)

    def put(number):
        start.wait()
        try:
            backend.put("manifests/1", bytes([number]) * 50_000)
            outcomes[number] = "won"
        except Exception as error:
            outcomes[number] = repr(error)

    threads = [threading.Thread(target=put, args=[n]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [number for number, outcome in outcomes.items() if outcome == "won"]
    assert len(won) == 1, outcomes
    assert all("Exists" in outcomes[number] for number in outcomes if number not in won), outcomes
    assert backend.get("manifests/1") == bytes(won) * 50_000


def test_what_is_not_there_is_said_so(backend):
    with pytest.raises(NotFound):
        backend.get("packs/none")
    with pytest.raises(NotFound):
        backend.get("nothing/none", 5, 10)
    assert [*backend.list("nothing/")] == []


def test_delete_may_be_repeated_and_frees_the_key(backend):
    backend.put("leases/1", b"x")
    for _ in range(2):
        backend.delete("leases/1")
    backend.delete("nothing/none")
    with pytest.raises(NotFound):
        backend.get("leases/1")
    backend.put("leases/1", b"y")
    assert backend.get("leases/1") == b"y"


def test_listings_are_ascending_of_the_prefix_alone_with_sizes(backend):
    for number in (12, 3, 100, 7):
        backend.put(f"manifests/{number:04d}-a", b"x" * number)
    backend.put("leases/0001-a", b"")
    backend.put("manifests/0003-b", b"")
    assert [*backend.list("manifests/")] == [
        Item("manifests/0003-a", 3),
        Item("manifests/0003-b", 0),
        Item("manifests/0007-a", 7),
        Item("manifests/0012-a", 12),
        Item("manifests/0100-a", 100),
    ]
    assert [item.key for item in backend.list("manifests/0003-")] == [
        "manifests/0003-a",
        "manifests/0003-b",
    ]


def test_a_long_listing_is_whole(backend):
    keys = [f"packs/{number:05d}" for number in range(1203)]
    for key in keys:
        backend.put(key, b"")
    assert [item.key for item in backend.list("packs/")] == keys


@pytest.mark.parametrize("key", ["", "packs", "packs/", "packs/../x", "packs/A", "/x", "packs/a/b"])
def test_what_is_no_key_is_refused(backend, key):
    for ask in (backend.get, backend.delete, lambda key: backend.put(key, b"")):
        with pytest.raises(Invalid):
            ask(key)


def test_a_listing_while_objects_move_up_always_meets_one_of_them(backend):
    """The order in time that collections rely on: put a higher key, then delete the lower."""
    backend.put("manifests/0000", b"")
    stop, numbers = threading.Event(), iter(range(1, 400))

    def move():
        for number in numbers:
            backend.put(f"manifests/{number:04d}", b"")
            backend.delete(f"manifests/{number - 1:04d}")
            if stop.is_set():
                return

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(40):
            assert [*backend.list("manifests/")]
    finally:
        stop.set()
        mover.join()


def test_wrong_credentials_and_a_wrong_bucket_are_said_so(bucket):
    with pytest.raises(Denied):
        S3(dataclasses.replace(bucket, secret_key="wrong")).get("packs/a")
    with pytest.raises((Permanent, Denied)):
        [*S3(dataclasses.replace(bucket, name="no-such-bucket")).list("packs/")]


def test_a_secret_key_is_not_shown(bucket):
    assert bucket.secret_key not in repr(bucket)


def test_checkpoints_are_kept_read_and_collected_over_it(backend):
    store, head, chance = Store(backend, Keys(bytes(32), "mine")), None, random.Random(3)
    image = bytearray(chance.randbytes(12 << 20))
    for _ in range(3):
        at = chance.randrange(180) << 16
        image[at : at + 70_000] = chance.randbytes(70_000)
        with Writer(store, "web", "qemu", head) as writer:
            writer.write("memory", io.BytesIO(image).read)
            head = writer.commit()
    report = collect(store, {"web": Keep(head=head, retention=Retention(last=1))})
    assert len(report.dropped) == 2
    assert report.missing == []
    taken = bytearray()
    Reader(store, store.open("web", head)).stream("memory", taken.extend)
    assert taken == image
    collect(store, {}, ["web"])
    assert [*backend.list("packs/"), *backend.list("manifests/"), *backend.list("leases/")] == []
    store.close()
