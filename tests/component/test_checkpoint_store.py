"""Checkpoints written and read back, over every backend's contract; and those that are refused."""

import io
import os
import random
import signal
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import BadState, Invalid, NotFound
from supercloud.services.checkpoint import reader
from supercloud.services.checkpoint.backend import Memory
from supercloud.services.checkpoint.collect import Keep, collect
from supercloud.services.checkpoint.directory import Directory
from supercloud.services.checkpoint.keys import Keys, Refused
from supercloud.services.checkpoint.lists import BLOCK_BYTES, PAGE_BYTES
from supercloud.services.checkpoint.manifest import Head
from supercloud.services.checkpoint.pages import Run
from supercloud.services.checkpoint.reader import Reader
from supercloud.services.checkpoint.retention import Retention
from supercloud.services.checkpoint.store import Store
from supercloud.services.checkpoint.writer import Writer

SECRET = bytes(range(32))


@pytest.fixture
def objects():
    return Memory()


@pytest.fixture
def store(objects):
    made = Store(objects, Keys(SECRET, "mine"))
    yield made
    made.close()


def take(store, image, head=None, ee="web", name="memory", **more):
    with Writer(store, ee, "qemu", head) as writer:
        writer.write(name, io.BytesIO(image).read)
        return writer.commit(**more)


def image_of(checkpoint, store, name="memory"):
    taken = bytearray()
    Reader(store, checkpoint).stream(name, taken.extend)
    return bytes(taken)


def copy_of(checkpoint, store, name="memory"):
    with tempfile.TemporaryFile() as file:
        Reader(store, checkpoint).copy(name, file.fileno())
        file.seek(0)
        return file.read()


def some_image(blocks, seed=0):
    chance = random.Random(seed)
    return b"".join(chance.randbytes(BLOCK_BYTES) for _ in range(blocks))


def stored_bytes(objects):
    return sum(map(len, objects.objects.values()))


pieces = st.lists(
    st.tuples(st.sampled_from([b"\0", b"a", b"bc", b"xyz"]), st.integers(0, 150_000)), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(pieces, pieces)
def test_any_image_is_read_back_as_it_was_written(first, second):
    store, head = Store(Memory(), Keys(SECRET, "mine"), pack_bytes=3000), None
    for image in (b"".join((unit * size)[:size] for unit, size in p) for p in (first, second)):
        head = take(store, image, head)
        checkpoint = store.open("web", head)
        assert image_of(checkpoint, store) == image
        with tempfile.TemporaryFile() as file:
            file.write(b"left from before" * 1000)
            Reader(store, checkpoint).copy("memory", file.fileno())
            file.seek(0)
            assert file.read() == image
    store.close()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.sets(st.integers(0, 69)),
    st.sets(st.integers(0, 69)),
    st.integers(0, 2**32),
)
def test_an_increment_over_its_base_is_the_image(page_count, first, second, seed):
    store, chance = Store(Memory(), Keys(SECRET, "mine"), pack_bytes=9000), random.Random(seed)
    image = bytearray(chance.randbytes(20) * (page_count * PAGE_BYTES // 20 + 1))
    del image[page_count * PAGE_BYTES :]
    head = take(store, image)
    base = store.open("web", head).manifest.part("memory").tree
    dirty = set()
    for pages in (first, second):
        dirty |= {page for page in pages if page < page_count}
        for page in dirty:
            image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([page]) * PAGE_BYTES
        with Writer(store, "web", "qemu", head) as writer:
            runs = [Run(page, 1) for page in sorted(dirty)]
            writer.increment("memory", base, runs, lambda at, size: bytes(image[at : at + size]))
            head = writer.commit()
        checkpoint = store.open("web", head)
        assert checkpoint.manifest.part("memory").base == base
        assert image_of(checkpoint, store) == image
        assert copy_of(checkpoint, store) == image
    store.close()


def test_a_file_is_filled_pack_by_pack_however_old_its_chunks_are(store, objects, monkeypatch):
    chance, head, asked = random.Random(4), None, []
    blocks = [chance.randbytes(20_000) + bytes(BLOCK_BYTES - 20_000) for _ in range(800)]
    for _ in range(6):  # each leaves chunks of its own here and there among the older ones
        head = take(store, b"".join(blocks), head)
        for number in chance.sample(range(800), 100):
            blocks[number] = chance.randbytes(20_000) + bytes(BLOCK_BYTES - 20_000)
    checkpoint, image = store.open("web", head), image_of(store.open("web", head), store)
    get = objects.get
    monkeypatch.setattr(objects, "get", lambda *which: asked.append(which) or get(*which))
    assert copy_of(checkpoint, store) == image
    packs = {key for key, *_ in asked}
    assert len(packs) >= 6
    assert len(asked) < 4 * len(packs), "the service does most of its work for each request"
    monkeypatch.setattr(reader, "WINDOW_BLOCKS", 100)
    assert copy_of(checkpoint, store) == image


def test_the_same_again_costs_next_to_nothing(store, objects):
    image = some_image(200)
    head = take(store, image)
    before = stored_bytes(objects)
    head = take(store, image, head)
    assert stored_bytes(objects) - before < 20_000
    changed = bytearray(image)
    for block in range(0, 200, 20):
        changed[block * BLOCK_BYTES] ^= 1
    before = stored_bytes(objects)
    take(store, bytes(changed), head)
    assert 10 * BLOCK_BYTES < stored_bytes(objects) - before < 11 * BLOCK_BYTES + 20_000


def test_zeros_cost_nothing_and_are_holes_when_restored(store, objects, tmp_path):
    image = bytes(40 << 20) + b"end"
    head = take(store, image)
    assert stored_bytes(objects) < 5000
    with (tmp_path / "out").open("w+b") as file:
        assert Reader(store, store.open("web", head)).copy("memory", file.fileno()) == len(image)
        assert os.fstat(file.fileno()).st_blocks * 512 < 1 << 20


def test_an_increment_is_small_and_shares_with_the_one_before(store, objects):
    image = bytearray(some_image(256))
    head = take(store, bytes(image))
    base = store.open("web", head).manifest.part("memory").tree
    grown = []
    for extra in (0, 16, 16):
        runs = [Run(page, 1) for page in range(0, 2048 + extra, 16)]
        before = stored_bytes(objects)
        with Writer(store, "web", "qemu", head) as writer:
            writer.increment("memory", base, runs, lambda at, size: bytes(image[at : at + size]))
            head = writer.commit()
        grown.append(stored_bytes(objects) - before)
    assert 128 * PAGE_BYTES < grown[0] < 128 * PAGE_BYTES + 40_000
    assert grown[1] < PAGE_BYTES + 40_000
    assert grown[2] < 20_000


def test_a_checkpoint_has_several_parts_details_and_a_parent(store):
    with Writer(store, "web", "qemu") as writer:
        writer.write("memory", io.BytesIO(b"m" * 100).read)
        writer.write("device", io.BytesIO(b"d" * 200).read)
        writer.write_at("disk:root", 300_001, lambda at, size: bytes([at % 251 + 1]) * size)
        first = writer.commit({"machine": "q35"})
    head = take(store, b"", first)
    newest, older = store.open("web", head), store.open("web", head, first.sequence)
    assert newest.manifest.parent == first
    assert [part.name for part in older.manifest.parts] == ["memory", "device", "disk:root"]
    assert older.manifest.details == {"machine": "q35"}
    assert older.manifest.part("disk:root").size_bytes == 300_001
    assert image_of(older, store, "device") == b"d" * 200
    assert image_of(newest, store) == b""
    assert Reader(store, older).verify() == 300_301


def test_what_is_asked_wrongly_is_refused(store):
    with Writer(store, "web", "qemu") as writer:
        with pytest.raises(BadState):
            writer.commit()
        writer._ended = False
        writer.write("memory", io.BytesIO(b"x").read)
        with pytest.raises(Invalid, match="written already"):
            writer.write("memory", io.BytesIO(b"x").read)
        foreign = take(store, b"y" * PAGE_BYTES, ee="other")
        tree = store.open("other", foreign).manifest.part("memory").tree
        with pytest.raises(Invalid, match="not of a checkpoint"):
            writer.increment("memory2", tree, [], lambda _at, size: bytes(size))
    with pytest.raises(BadState):
        writer.write("device", io.BytesIO(b"x").read)
    with pytest.raises(Invalid):
        with Writer(store, "web", "qemu") as writer:
            writer.write("no such part", io.BytesIO(b"x").read)
            writer.commit()
    with pytest.raises(NotFound):
        store.open("other", foreign, 77)
    with pytest.raises(Invalid):
        Keys(b"short", "mine")


def test_a_writer_that_fails_leaves_no_checkpoint_and_no_lease(objects):
    store = Store(objects, Keys(SECRET, "mine"), workers=0)  # one pack is filled after the other
    with pytest.raises(RuntimeError), Writer(store, "web", "qemu") as writer:
        writer.write("memory", io.BytesIO(some_image(300)).read)
        raise RuntimeError
    assert {key.partition("/")[0] for key in objects.objects} == {"packs"}
    report = collect(store, {})
    assert report.freed_packs > 0
    assert objects.objects == {}


def test_nothing_in_the_store_shows_names_or_contents(store, objects):
    marker = b"a secret sentence that must not be seen"
    take(store, marker * 5000, ee="payroll", details={"machine": "hush-hush"})
    everything = b"".join(key.encode() + data for key, data in objects.objects.items())
    for word in (marker, b"payroll", b"hush-hush", b"mine", b"qemu", b"memory"):
        assert word not in everything


def test_equal_contents_under_another_key_have_nothing_in_common(objects):
    for secret in (SECRET, bytes(32)):
        take(Store(objects, Keys(secret, "mine"), workers=0), some_image(3))
    packs = [data for key, data in objects.objects.items() if key.startswith("packs/")]
    assert len(packs) == 2
    assert packs[0] != packs[1]


# --- what is refused, and why -------------------------------------------------------------------


@pytest.fixture
def taken(store, objects):
    """Two checkpoints of web and one of db; heads by name."""
    first = take(store, some_image(3, 1))
    second = take(store, some_image(3, 2), first)
    return {"first": first, "web": second, "db": take(store, some_image(3, 3), ee="db")}


def key_of(objects, kind, head, store, ee):
    prefix = f"{kind}/{head.sequence:012x}-{store.keys.ee_id(ee)}"
    return next(key for key in objects.objects if key.startswith(prefix))


def reason_of(store, head, ee="web"):
    with pytest.raises(Refused) as caught:
        Reader(store, store.open(ee, head)).verify()
    assert caught.value.details == {"reason": caught.value.reason}
    return caught.value.reason


def test_any_flipped_bit_is_found(store, objects, taken):
    """In the manifest and in the packs of this checkpoint; others are not touched by it."""
    chance = random.Random(4)
    manifest = key_of(objects, "manifests", taken["web"], store, "web")
    nonce = manifest.rpartition("-")[2]
    for key in [manifest, *(k for k in objects.objects if k.startswith(f"packs/{nonce}"))]:
        whole = objects.objects[key]
        places = {0, 7, 8, 9, 12, len(whole) - 1} | {
            chance.randrange(len(whole)) for _ in range(40)
        }
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << chance.randrange(8)
            objects.objects[key] = bytes(flipped)
            assert reason_of(store, taken["web"]) in ("tampered", "newer", "foreign", "replayed")
        objects.objects[key] = whole
    Reader(store, store.open("web", taken["web"])).verify()


def test_a_cut_or_missing_object_is_found(store, objects, taken):
    manifest = key_of(objects, "manifests", taken["web"], store, "web")
    nonce = manifest.rpartition("-")[2]
    pack = next(key for key in objects.objects if key.startswith(f"packs/{nonce}"))
    for key in (manifest, pack):
        whole = objects.objects[key]
        for length in (0, 1, 60, len(whole) // 2, len(whole) - 1):
            objects.objects[key] = whole[:length]
            assert reason_of(store, taken["web"]) in ("truncated", "tampered")
        del objects.objects[key]
        assert reason_of(store, taken["web"]) == "missing"
        objects.objects[key] = whole


def test_an_old_checkpoint_in_place_of_the_newest_is_a_replay(store, objects, taken):
    old = objects.objects[key_of(objects, "manifests", taken["first"], store, "web")]
    objects.objects[key_of(objects, "manifests", taken["web"], store, "web")] = old
    assert reason_of(store, taken["web"]) == "replayed"


def test_the_checkpoint_of_another_ee_is_foreign(store, objects, taken):
    other = objects.objects[key_of(objects, "manifests", taken["db"], store, "db")]
    objects.objects[key_of(objects, "manifests", taken["web"], store, "web")] = other
    assert reason_of(store, taken["web"]) == "foreign"


def test_an_authentic_checkpoint_that_is_not_the_one_remembered_is_a_replay(store, taken):
    assert reason_of(store, Head(taken["web"].sequence, "0" * 64)) == "replayed"
    assert reason_of(store, Head(99, taken["web"].root)) == "missing"


def test_packs_exchanged_with_one_another_are_refused(store, objects, taken):
    packs = [key for key in sorted(objects.objects) if key.startswith("packs/")]
    contents = [objects.objects[key] for key in packs]
    for key, data in zip(packs, contents[1:] + contents[:1], strict=True):
        objects.objects[key] = data
    assert reason_of(store, taken["web"]) == "tampered"


def test_another_u_clouds_or_a_wrong_key_opens_nothing(objects, taken):
    for keys in (Keys(SECRET, "other"), Keys(bytes(32), "mine")):
        other = Store(objects, keys, workers=0)
        assert reason_of(other, taken["web"]) == "missing"  # even the EE's name is another
        other.keys.ee_id = Keys(SECRET, "mine").ee_id
        assert reason_of(other, taken["web"]) == "tampered"


def test_a_later_version_is_said_to_be_one(store, objects, taken):
    key = key_of(objects, "manifests", taken["web"], store, "web")
    whole = objects.objects[key]
    objects.objects[key] = whole[:7] + b"\x02" + whole[8:]
    assert reason_of(store, taken["web"]) == "newer"


def test_planted_copies_beside_the_newest_do_not_hide_it(store, objects, taken):
    key = key_of(objects, "manifests", taken["web"], store, "web")
    for planted in range(5):
        objects.objects[key[:-32] + f"{planted:032x}"] = objects.objects[key]
    assert store.open("web", taken["web"]).head == taken["web"]


def test_a_collection_frees_nothing_while_a_record_is_not_authentic(store, objects, taken):
    objects.objects["packs/" + "0" * 32 + "-00000000"] = b"garbage"
    key = key_of(objects, "manifests", taken["db"], store, "db")
    objects.objects[key] = objects.objects[key][:-1] + b"?"
    keep = {"web": Keep(head=taken["web"], retention=Retention(last=1))}
    with pytest.raises(Refused):
        collect(store, keep)
    assert "packs/" + "0" * 32 + "-00000000" in objects.objects


# --- retention, and what a collection leaves ----------------------------------------------------


def test_the_last_ones_are_kept_and_the_rest_goes_with_its_chunks(store, objects):
    head, heads = None, []
    for number in range(6):
        head = take(store, some_image(4, number), head)
        heads.append(head)
    report = collect(store, {"web": Keep(head=head, retention=Retention(last=2))})
    assert len(report.dropped) == 4
    assert report.freed_bytes > 4 * 4 * BLOCK_BYTES
    assert report.live_bytes + 8000 > stored_bytes(objects)
    for kept in heads[-2:]:
        assert Reader(store, store.open("web", head, kept.sequence)).verify() == 4 * BLOCK_BYTES
    with pytest.raises(Refused, match="not in the store"):
        store.open("web", head, heads[0].sequence)
    head = take(store, some_image(4, 5), head)
    assert [k.sequence for k in store.open("web", head).manifest.history] == [6, 5]


def test_packs_that_are_mostly_dead_are_left_behind(objects):
    """However long checkpoints go on, the store holds at most some twice of what is live."""
    store, head, chance = Store(objects, Keys(SECRET, "mine"), workers=0), None, random.Random(1)
    image = bytearray(some_image(64))
    for _ in range(40):
        for _ in range(6):
            at = chance.randrange(64) * BLOCK_BYTES
            image[at : at + BLOCK_BYTES] = chance.randbytes(BLOCK_BYTES)
        head = take(store, bytes(image), head)
        collect(store, {"web": Keep(head=head, retention=Retention(last=1))})
        assert stored_bytes(objects) < 2.6 * len(image)
    assert image_of(store.open("web", head), store) == image


def test_a_missing_pack_of_a_live_checkpoint_is_reported(store, objects, taken):
    pack = next(key for key in objects.objects if key.startswith("packs/"))
    del objects.objects[pack]
    assert collect(store, {}).missing == [pack]


# --- processes ----------------------------------------------------------------------------------

KILLED = """
import io, os, sys
from pathlib import Path
from supercloud.services.checkpoint.directory import Directory
from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.store import Store
from supercloud.services.checkpoint.writer import Writer
store = Store(Directory(Path(sys.argv[1])), Keys(bytes(range(32)), "mine"), pack_bytes=100_000)
while True:
    with Writer(store, "web", "qemu") as writer:
        writer.write("memory", io.BytesIO(os.urandom(3_000_000)).read)
        head = writer.commit()
    print(head.sequence, head.root, flush=True)
"""


def test_what_was_committed_before_a_kill_is_there_and_the_rest_is_collected(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    heads = [
        Head(int(n), root) for n, root in (process.stdout.readline().split() for _ in range(3))
    ]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = Store(Directory(tmp_path), Keys(SECRET, "mine"), workers=0)
    collect(store, {}, abandoned=lambda _ref, _lease: True)
    for head in heads:
        assert Reader(store, store.open("web", head)).verify() == 3_000_000
    assert {path.name for path in tmp_path.iterdir()} == {"manifests", "packs", "leases", ".lock"}
    assert [*(tmp_path / "leases").iterdir()] == []


def test_memory_stays_bounded_however_large_the_part(tmp_path):
    """A gigabyte in and out adds a few packs and batches to what the process holds."""
    program = """
import os, resource, sys
from pathlib import Path
from supercloud.services.checkpoint.directory import Directory
from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.reader import Reader
from supercloud.services.checkpoint.store import Store
from supercloud.services.checkpoint.writer import Writer
store = Store(Directory(Path(sys.argv[1])), Keys(bytes(range(32)), "mine"), workers=3)
pool = os.urandom(32 << 20)
left = 1024
def read(size):
    global left
    left -= 1
    start = left * 31337 % (31 << 20)
    return pool[start : start + (1 << 20)] if left >= 0 else b""
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Writer(store, "web", "qemu") as writer:
    writer.write("fs", read)
    head = writer.commit()
seen = 0
for _, data in Reader(store, store.open("web", head)).blocks("fs"):
    seen += len(data)
print(seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    seen, grown_kib = map(int, done.stdout.split())
    assert seen == 1 << 30
    assert grown_kib < 160 << 10
