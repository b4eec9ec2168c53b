"""Seals go forward only, whatever a host shows, and in whatever order."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.control import seals
from supercloud.control.controllers import learning
from supercloud.control.controllers.plane import Pace
from supercloud.control.documents import VolumeDocument, dump, load
from supercloud.control.views import rollback_text
from supercloud.model.errors import Denied
from supercloud.model.resources import Provider, Volume
from supercloud.model.states import KEPT_VOLUME, VOLUME
from supercloud.services.protection import engine
from supercloud.services.protection.service import SEAL_EVERY_S
from supercloud.wire.volumes import Seal, VolumeStatus

A, B = "a" * 64, "b" * 64
KEPT = Seal(epoch=4, sequence=20, root=A)


def document(**fields):
    values = {
        "ucloud": "u", "name": "v", "spec": Volume(name="v", size_bytes=1 << 20),
        "provider": Provider(name="p", kind="fake"), "host": "h", **fields,
    }  # fmt: skip
    return VolumeDocument(**values)


def status(state, seal=KEPT, **fields):
    return VolumeStatus(
        name="v", state=state, size_bytes=1 << 20, format="raw", seal=seal, **fields
    )


@pytest.mark.parametrize(
    ("shown", "objection"),
    [
        (KEPT, ""),
        (Seal(epoch=4, sequence=21, root=B), ""),
        (Seal(epoch=5, sequence=20, root=A), ""),
        (Seal(epoch=3, sequence=20, root=A), ""),  # the same state, by one that only reads it
        (Seal(), ""),
        (Seal(epoch=3, sequence=21, root=B), "epoch 3, and was at 4"),
        (Seal(epoch=4, sequence=19, root=B), "state 19, and was at 20"),
        (Seal(epoch=5, sequence=19, root=B), "state 19, and was at 20"),
        (Seal(epoch=4, sequence=20, root=B), "another one than it was"),
        (Seal(epoch=5, sequence=20, root=B), "another one than it was"),
    ],
)
def test_what_cannot_follow_is_objected_to(shown, objection):
    found = seals.objection(KEPT, shown)
    assert objection in found if objection else found == ""


def test_the_epoch_does_not_go_back_with_what_is_accepted():
    older = Seal(epoch=2, sequence=9, root=B)
    assert seals.accepted(KEPT, older) == Seal(epoch=4, sequence=9, root=B)
    assert seals.newest(KEPT, replace(KEPT, epoch=3)) == KEPT


def test_one_that_was_never_opened_may_become_anything():
    assert seals.objection(Seal(), Seal(epoch=9, sequence=9, root=A)) == ""


shown = st.builds(
    Seal, epoch=st.integers(0, 3), sequence=st.integers(0, 3), root=st.sampled_from([A, B, ""])
)


@given(st.lists(shown, max_size=12), st.lists(st.sampled_from(sorted(VOLUME)), max_size=12))
def test_whatever_a_host_shows_the_trusted_seal_never_goes_back(series, states):
    volume = document(state="served", opened=True)
    for seal, state in zip(series, states, strict=False):
        before = replace_of(volume)
        learning.take(volume, status(state, seal))
        assert volume.seal.epoch >= before.seal.epoch
        assert volume.seal.sequence >= before.seal.sequence
        if volume.seal.sequence == before.seal.sequence and before.seal.root:
            assert volume.seal.root == before.seal.root
        assert volume.state in KEPT_VOLUME
        if before.halted:
            assert (volume.halted, volume.seal) == (before.halted, before.seal)


def test_the_window_that_is_printed_holds_all_that_it_is_made_of():
    """What nobody flushed becomes durable, and then is told to, or asked for by, whoever keeps it."""
    native = Path(engine.__file__).parent / "native" / "api.c"
    figures = dict(re.findall(r"#define (\w+) (\d+)", native.read_text()))
    durable_s = int(figures["UNCOMMITTED_NS"]) / 1e9 + int(figures["HOUSEKEEPING_S"])
    assert 0 < durable_s + SEAL_EVERY_S <= seals.WINDOW_S
    assert 0 < durable_s + Pace().seal_s <= seals.WINDOW_S


def test_the_window_is_printed_and_grows_while_nothing_is_heard():
    assert rollback_text(0.0) == rollback_text(4.9) == f"at most {seals.WINDOW_S:g} s"
    assert rollback_text(12.5) == "at most 12.5 s"
    assert rollback_text(-1.0).startswith("none")


def replace_of(volume):
    return load(VolumeDocument, "volume/u/v", dump(volume))


def test_a_halted_one_learns_nothing_until_its_user_acts():
    volume = document(state="attached", opened=True, seal=KEPT, platform="p1", slot=2)
    learning.take(volume, status("attached", replace(KEPT, root=B), platform="p1", slot=2))
    assert volume.state == "failed"
    assert (volume.platform, volume.slot) == ("p1", 2)  # what uses it is not torn out
    assert "supercloud volumes accept u/v" in volume.error["hint"]
    learning.take(volume, status("served", Seal(epoch=9, sequence=90, root=B)))
    assert (volume.state, volume.seal) == ("failed", KEPT)


def test_evidence_of_single_blocks_is_counted_and_halts_nothing():
    before = document(state="attached", opened=True, seal=KEPT, evidence=1)
    after = replace_of(before)
    now = status("attached", evidence=3, platform="p1", slot=1)
    learning.take(after, now)
    (event,) = learning.news(before, after, now)
    assert event[0] == "evidence"
    assert event[2] == "error"
    assert "2 blocks" in event[1]
    assert not after.halted


def test_a_full_disk_and_its_end_are_told_once_each_and_are_no_evidence():
    before = document(state="attached", opened=True, seal=KEPT)
    told = []
    for full in (True, True, False, False):
        after = replace_of(before)
        now = status("attached", full=full, platform="p1", slot=1)
        learning.take(after, now)
        told += learning.news(before, after, now)
        before = after
    assert [(code, severity) for code, _, severity in told] == [("full", "error"), ("room", "info")]


@pytest.mark.parametrize("untrusted", [None, "x", {"epoch": -1}, {"root": "zz"}, [1]])
def test_a_refusal_that_shows_nonsense_shows_nothing(untrusted):
    assert learning.found_in(Denied("no", details={"found": untrusted})) is None


def test_a_refusal_shows_the_seal_that_was_found():
    found = {"epoch": 1, "sequence": 2, "root": A, "more": 1}
    assert learning.found_in(Denied("no", details={"found": found})) == Seal(
        epoch=1, sequence=2, root=A
    )
