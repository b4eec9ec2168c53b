"""The metadata journal under crashes and alterations at any point, against a plain model."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import Invalid, Permanent
from supercloud.services.objects import journal as journals
from supercloud.services.objects.aead import Aead
from supercloud.services.objects.entries import size_bytes
from supercloud.services.objects.journal import Journal
from supercloud.services.objects.tables import (
    ADD,
    DELETE,
    REMOVE,
    SET,
    Change,
    Tables,
    from_bytes,
)

KEY = bytes(range(32))
RECORDS = st.lists(st.binary(max_size=300), min_size=1, max_size=25)


@contextmanager
def opened(place: Path, **more: Any) -> Iterator[tuple[Journal, list[bytes]]]:
    directory, found = os.open(place, os.O_RDONLY), list[bytes]()
    journal = Journal(directory, KEY, **more)
    try:
        journal.replay(found.append)
        yield journal, found
    finally:
        journal.close()
        os.close(directory)


@pytest.fixture
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "SEGMENT_BYTES", 700)


def newest(place: Path) -> Path:
    return max(place.glob("*.log"))


@settings(deadline=None, max_examples=60)
@given(RECORDS, RECORDS, st.data())
def test_a_torn_end_loses_nothing_that_was_flushed(
    flushed: list[bytes], after: list[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with opened(place) as (journal, _):
            for record in flushed:
                journal.append(record)
            journal.flush()
            safe_bytes = newest(place).stat().st_size
            for record in after:
                journal.append(record)
        last = newest(place)
        cut = data.draw(st.integers(safe_bytes, last.stat().st_size))
        garbage = data.draw(st.binary(max_size=40))
        last.write_bytes(last.read_bytes()[:cut] + garbage)
        with opened(place) as (journal, found):
            assert found[: len(flushed)] == flushed
            assert found == (flushed + after)[: len(found)]
            kept = list(found)
            journal.append(b"then")
        with opened(place) as (_, found):
            assert found == [*kept, b"then"]


@settings(deadline=None, max_examples=60)
@given(RECORDS, st.data())
def test_what_is_before_the_newest_segment_cannot_be_altered(
    records: list[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with opened(place) as (journal, _):
            for record in records:
                journal.append(record)
        victim = newest(place)
        with opened(place):
            pass
        content = bytearray(victim.read_bytes())
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] ^= data.draw(st.integers(1, 255))
        if data.draw(st.booleans()):
            content = content[:where]
        victim.write_bytes(content)
        with pytest.raises(Permanent), opened(place):
            pass


@pytest.mark.usefixtures("_small_segments")
def test_segments_are_taken_out_put_back_and_reordered_in_vain(tmp_path: Path) -> None:
    with opened(tmp_path) as (journal, _):
        for number in range(60):
            journal.append(b"%060d" % number)
    segments = sorted(tmp_path.glob("*.log"))
    assert len(segments) > 4
    for victim in segments[:-1]:
        content = victim.read_bytes()
        victim.unlink()
        with pytest.raises(Permanent, match="missing"), opened(tmp_path):
            pass
        victim.write_bytes(segments[-1].read_bytes())
        with pytest.raises(Permanent), opened(tmp_path):
            pass
        victim.write_bytes(content)
    with opened(tmp_path) as (_, found):
        assert found == [b"%060d" % number for number in range(60)]


@pytest.mark.usefixtures("_small_segments")
def test_dropped_segments_stay_dropped_whenever_it_crashes(tmp_path: Path) -> None:
    place, copy = tmp_path / "now", tmp_path / "copy"
    place.mkdir()
    with opened(place) as (journal, _):
        for number in range(30):
            journal.append(b"%060d" % number)
        journal.flush()
        first = journal.oldest
        assert journal.segment > first + 2
        whole = {path.name: path.read_bytes() for path in place.iterdir()}
        kept = list(journal.read(first))
        for record in kept:
            journal.append(record)
        journal.flush()
        journal.drop_oldest()
        assert journal.oldest == first + 1
        shutil.copytree(place, copy)
    oldest = min(whole)
    (copy / oldest).write_bytes(whole[oldest])  # the removal was not on the disk yet
    for where in (place, copy):
        with opened(where) as (_, found):
            assert sorted(set(found)) == [b"%060d" % number for number in range(30)]
        assert oldest not in {path.name for path in where.iterdir()}


def test_a_cut_off_end_is_seen_by_whoever_kept_the_position(tmp_path: Path) -> None:
    with opened(tmp_path) as (journal, _):
        journal.append(b"1")
        journal.flush()
        early, content = journal.position, newest(tmp_path).read_bytes()
        journal.append(b"2")
        journal.flush()
        late = journal.position
    newest(tmp_path).write_bytes(content)
    assert early < late
    with pytest.raises(Permanent, match="rolled back"), opened(tmp_path, least=late):
        pass
    with opened(tmp_path, least=early) as (_, found):
        assert found == [b"1"]


@given(st.binary(max_size=100), st.binary(max_size=20), st.data())
def test_sealed_bytes_open_only_as_they_were(
    plain: bytes, bound: bytes, data: st.DataObject
) -> None:
    nonce = bytes(12)
    sealed = Aead(KEY).seal(nonce, plain, bound)
    assert Aead(KEY).open(nonce, sealed, bound) == plain
    where = data.draw(st.integers(0, len(sealed) - 1))
    changed = bytes(b ^ (i == where) for i, b in enumerate(sealed))
    for untrusted, with_nonce, with_bound, key in (
        (changed, nonce, bound, KEY),
        (sealed, bytes(11) + b"1", bound, KEY),
        (sealed, nonce, bound + b"1", KEY),
        (sealed, nonce, bound, bytes(32)),
        (sealed[:-1], nonce, bound, KEY),
    ):
        with pytest.raises(Invalid):
            Aead(key).open(with_nonce, untrusted, with_bound)


def test_the_cipher_is_the_standards() -> None:
    """NIST's GCM test vectors, cases 13 and 14."""
    assert Aead(bytes(32)).seal(bytes(12), b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    assert Aead(bytes(32)).seal(bytes(12), bytes(16), b"").hex() == (
        "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    )


NAMES = st.sampled_from([b"a", b"b", b"b0", b"c"])
CHANGES = st.one_of(
    st.builds(
        Change, st.just(SET), NAMES.map(lambda n: b"/buckets/one/" + n), st.just(b"\x4a\x03abc")
    ),
    st.builds(
        Change, st.just(SET), NAMES.map(lambda n: b"/buckets/two/" + n), st.just(b"\x4a\x01x")
    ),
    st.builds(Change, st.just(DELETE), NAMES.map(lambda n: b"/buckets/one/" + n)),
    st.builds(Change, st.just(ADD), st.just(b"/buckets/one\0"), NAMES),
    st.builds(Change, st.just(REMOVE), st.just(b"/buckets/one\0"), NAMES),
    st.builds(Change, st.just(DELETE), st.just(b"/buckets/one\0")),
)


@given(st.lists(CHANGES, max_size=60))
def test_tables_agree_with_a_model_and_their_usage_with_a_count(changes: list[Change]) -> None:
    tables, values, names = Tables(), dict[bytes, bytes](), set[bytes]()
    for change in changes:
        tables.apply(from_bytes(change.to_bytes()))
        if change.operation == SET:
            values[change.key] = change.value
        elif change.operation == DELETE:
            values.pop(change.key, None)
            if change.key.endswith(b"\0"):
                names.clear()
        elif change.operation == ADD:
            names.add(change.value)
        else:
            names.discard(change.value)
    assert tables.values == values
    assert tables.between(b"/buckets/one\0", b"-", b"+", -1) == sorted(names)
    assert (
        tables.between(b"/buckets/one\0", b"(b", b"+", 2)
        == sorted(n for n in names if n > b"b")[:2]
    )
    assert tables.between(b"/buckets/one\0", b"[b", b"[b0", 9) == sorted(
        n for n in names if b"b" <= n <= b"b0"
    )
    for bucket in ("one", "two"):
        mine = [v for k, v in values.items() if k.startswith(f"/buckets/{bucket}/".encode())]
        usage = tables.usage.get(bucket)
        assert (usage.content_bytes if usage else 0) == sum(map(size_bytes, mine))
        assert (usage.entries if usage else 0) == len(mine)
        assert (usage.charged_bytes if usage else 0) == sum(1024 + size_bytes(v) for v in mine)
    for key in values:
        tables.apply(Change(DELETE, key))
    tables.apply(Change(DELETE, b"/buckets/one\0"))
    assert tables.live_bytes == 0
    assert not tables.usage


@given(st.binary(max_size=200))
def test_entries_that_are_none_are_refused_or_read(untrusted: bytes) -> None:
    with contextlib.suppress(Invalid):
        assert size_bytes(untrusted) >= 0
