"""What every provider's volumes keep to; the test of slots, which wants nine, is for pretended ones."""

import asyncio
import base64
import contextlib
import os
from dataclasses import replace

import pytest

from supercloud.model.errors import BadState, Denied, Invalid, NoResources, NotFound
from supercloud.model.states import VOLUME
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.volumes import Seal, VolumeCopy, VolumeOpen, VolumeSpec
from support.providers import KINDS, PRETENDED, REAL

WITH_VOLUMES = [*PRETENDED, REAL]
MIB = 1 << 20
SPEC = VolumeSpec(name="data", size_bytes=16 * MIB, tag="supercloud:demo")


@pytest.fixture(params=WITH_VOLUMES)
async def provider(request, tmp_path, link):
    async with KINDS[request.param](request, tmp_path, link) as made:
        yield made
        await _clear(made)


async def _clear(provider):
    for platform in await provider.platforms():
        await provider.delete_platform(platform.name)
    for host, status in await provider.volumes.list():
        with contextlib.suppress(NotFound, BadState):
            await provider.volumes.detach(host, status.name)
        await provider.volumes.delete(host, status.name)


class Owner:
    """Keeps what a control plane keeps of one volume, and asks for it."""

    def __init__(self, volumes, host, spec=SPEC):
        self.volumes, self.host, self.spec = volumes, host, spec
        self.key = base64.b64encode(os.urandom(32)).decode()
        self.seal = Seal()

    async def open(self, **changes):
        """First step only."""
        asked = VolumeOpen(spec=self.spec, key_base64=self.key, seal=self.seal)
        status = await self.volumes.open(self.host, replace(asked, **changes))
        return self._kept(status)

    async def serve(self):
        """Both steps."""
        status = await self.open()
        name, epoch = self.spec.name, status.seal.epoch
        return self._kept(await self.volumes.serve(self.host, name, epoch))

    async def do(self, what, *arguments):
        return self._kept(await getattr(self.volumes, what)(self.host, self.spec.name, *arguments))

    def _kept(self, status):
        if status.seal.root:
            self.seal = status.seal
        return status


@pytest.fixture
async def owner(provider):
    return Owner(provider.volumes, (await provider.hosts())[0].name)


async def only(provider):
    ((_, status),) = await provider.volumes.list()
    return status


async def test_a_provider_says_that_it_has_volumes(provider):
    assert (await provider.features())["volumes"] == ""
    assert provider.volumes is not None


async def test_a_new_one_is_opened_and_has_a_seal(provider, owner):
    status = await owner.open()
    assert (status.name, status.state, status.format) == ("data", "opened", "qcow2")
    assert status.size_bytes == SPEC.size_bytes
    assert status.seal.epoch >= 1
    assert len(status.seal.root) == 64
    assert status.tag == SPEC.tag
    ((host, listed),) = await provider.volumes.list()
    assert (host, listed.name, listed.state) == (owner.host, "data", "opened")


async def test_it_is_not_used_before_its_epoch_is_kept(provider, owner, ask):
    await provider.ensure_platform(ask())
    await owner.open()
    with pytest.raises(BadState):
        await owner.do("attach", "p1")
    with pytest.raises((Denied, BadState)):
        await owner.do("serve", owner.seal.epoch + 1)
    assert (await owner.do("serve", owner.seal.epoch)).state == "served"
    assert (await owner.do("serve", owner.seal.epoch)).state == "served"


async def test_opened_again_its_epoch_never_goes_down(owner):
    epochs = [(await owner.open()).seal.epoch for _ in range(3)]
    assert epochs == sorted(epochs)
    await owner.serve()
    await owner.do("close")
    last = owner.seal.epoch
    assert (await owner.serve()).seal.epoch > last


async def test_a_control_plane_that_died_before_it_kept_the_epoch_opens_it_again(owner):
    await owner.open()
    owner.seal = Seal()  # it never heard the answer
    assert (await owner.serve()).state == "served"


async def test_attached_it_has_a_slot_and_a_mode(provider, owner, ask):
    await provider.ensure_platform(ask())
    await owner.serve()
    status = await owner.do("attach", "p1")
    assert (status.state, status.platform) == ("attached", "p1")
    assert 1 <= status.slot <= VOLUME_SLOTS
    assert status.mode in ("vhost-user-blk", "nbd")
    again = await owner.do("attach", "p1")
    assert (again.slot, again.state) == (status.slot, "attached")
    larger = replace(SPEC, size_bytes=32 * MIB)
    for _ in range(2):
        grown = await provider.volumes.change(owner.host, larger)
        assert (grown.size_bytes, grown.state) == (32 * MIB, "attached")
    with pytest.raises(BadState):
        await owner.do("close")
    for _ in range(2):
        gone = await owner.do("detach")
        assert (gone.state, gone.platform, gone.slot) == ("served", "", 0)
    for _ in range(2):
        assert (await owner.do("close")).state == "closed"


async def test_nobody_has_it_twice(provider, owner, ask):
    await provider.ensure_platform(ask())
    await owner.serve()
    with pytest.raises((BadState, NotFound)):
        await owner.do("attach", "nobody")
    await owner.do("attach", "p1")
    with pytest.raises((BadState, NotFound)):
        await owner.do("attach", "p2")
    assert (await only(provider)).platform == "p1"


async def test_a_platform_that_goes_leaves_it_behind(provider, owner, ask):
    await provider.ensure_platform(ask())
    await owner.serve()
    await owner.do("attach", "p1")
    await provider.delete_platform("p1")
    status = await only(provider)
    assert (status.platform, status.slot) == ("", 0)
    assert status.state != "attached"
    await owner.do("detach")
    assert (await owner.do("close")).state == "closed"


async def test_every_state_is_one_of_the_table(provider, owner):
    for step in ("open", "serve"):
        assert (await getattr(owner, step)()).state in VOLUME
    assert (await only(provider)).state in VOLUME


@pytest.mark.parametrize("what", ["sequence", "root"])
async def test_what_is_older_than_its_owner_knows_is_refused_and_shown(provider, owner, what):
    await owner.serve()
    await owner.do("close")
    true = owner.seal
    newer = {
        "sequence": replace(true, sequence=true.sequence + 1, root="a" * 64),
        "root": replace(true, root="b" * 64),
    }[what]
    with pytest.raises(Denied) as caught:
        await owner.open(seal=newer)
    assert Seal(**caught.value.details["found"]).root == true.root
    assert (await only(provider)).state != "opened"
    assert (await owner.open(seal=true)).state == "opened"


async def test_accepted_as_it_is_it_begins_with_an_epoch_that_was_never_used(owner):
    await owner.serve()
    await owner.do("close")
    given_up = replace(owner.seal, epoch=owner.seal.epoch + 7)
    assert (await owner.open(seal=given_up)).seal.epoch > given_up.epoch


async def test_serving_makes_a_state_so_that_one_from_before_is_older(owner):
    await owner.serve()
    await owner.do("close")
    before = owner.seal
    opened = await owner.open()
    assert (opened.seal.sequence, opened.seal.root) == (before.sequence, before.root)
    served = await owner.do("serve", owner.seal.epoch)
    assert served.seal.sequence > before.sequence


async def test_another_key_opens_nothing(owner):
    await owner.serve()
    await owner.do("close")
    other = base64.b64encode(os.urandom(32)).decode()
    with pytest.raises(Denied):
        await owner.open(key_base64=other)
    assert (await owner.open()).state == "opened"


async def test_one_that_is_not_there_is_not_made_in_the_place_of_one_that_was(provider, owner):
    with pytest.raises(NotFound):
        await owner.open(seal=Seal(epoch=3, sequence=8, root="c" * 64))
    assert await provider.volumes.list() == []
    with pytest.raises(NotFound):
        await provider.volumes.open(
            "nowhere", VolumeOpen(spec=SPEC, key_base64=owner.key, seal=Seal())
        )


async def test_deleted_is_gone_and_deleting_again_is_fine(provider, owner):
    await owner.serve()
    for _ in range(2):
        await provider.volumes.delete(owner.host, "data")
    assert await provider.volumes.list() == []
    with pytest.raises(NotFound):
        await owner.do("serve", 1)
    owner.seal = Seal()
    await owner.open()
    assert (await only(provider)).state == "opened"


async def test_it_grows_and_does_not_shrink(provider, owner):
    await owner.serve()
    larger = replace(SPEC, size_bytes=32 * MIB, iops=100, bytes_per_s=MIB)
    for _ in range(2):
        assert (await provider.volumes.change(owner.host, larger)).size_bytes == 32 * MIB
    with pytest.raises(Invalid):
        await provider.volumes.change(owner.host, SPEC)
    assert (await only(provider)).size_bytes == 32 * MIB


async def test_snapshots_move_the_seal_forward_also_back_to_one(provider, owner, ask):
    await owner.serve()
    before = owner.seal
    for _ in range(2):
        assert (await owner.do("snapshot", "first")).snapshots == ["first"]
    assert owner.seal.sequence > before.sequence
    between = owner.seal
    await owner.do("revert", "first")
    assert owner.seal.sequence > between.sequence
    with pytest.raises(NotFound):
        await owner.do("revert", "second")
    await provider.ensure_platform(ask())
    await owner.do("attach", "p1")
    with pytest.raises(BadState):
        await owner.do("revert", "first")
    await owner.do("detach")
    for _ in range(2):
        assert (await owner.do("forget", "first")).snapshots == []
    await owner.do("close")
    assert (await owner.open()).state == "opened"


async def filled(provider, owner, **asked):
    """Ask until the copy is done."""
    while True:
        status = await provider.volumes.fill(owner.host, VolumeCopy(of=SPEC.name, **asked))
        if status.copied == asked["number"]:
            return status
        assert status.copying
        await asyncio.sleep(0.05)


async def test_another_one_is_filled_from_a_snapshot_and_is_its_backup_then(provider, owner):
    await owner.serve()
    await owner.do("snapshot", "first")
    other = Owner(provider.volumes, owner.host, replace(SPEC, name="other"))
    await other.serve()
    for wrong in ("second", "first-"):
        with pytest.raises((NotFound, Invalid)):
            await filled(provider, owner, name="other", number=1, snapshot=wrong)
    before = other.seal
    for _ in range(2):
        await filled(provider, owner, name="other", number=1, snapshot="first")
    for number in (2, 3):
        status = await filled(provider, owner, name="other", number=number)
    assert status.seal.sequence > before.sequence
    with pytest.raises((NotFound, Invalid)):
        await filled(provider, owner, name=SPEC.name, number=4)
    await owner.do("close")
    with pytest.raises(BadState):
        await filled(provider, owner, name="other", number=4)
    assert (await other.do("close")).copied == 3


async def test_what_is_in_use_is_not_copied_into(provider, owner, ask):
    await owner.serve()
    other = Owner(provider.volumes, owner.host, replace(SPEC, name="other"))
    await other.serve()
    await provider.ensure_platform(ask())
    await other.do("attach", "p1")
    with pytest.raises(BadState):
        await filled(provider, owner, name="other", number=1)
    await other.do("detach")
    await owner.do("attach", "p1")  # what is copied from may be in use
    assert (await filled(provider, owner, name="other", number=1)).copied == 1


@pytest.mark.parametrize("provider", PRETENDED, indirect=True)
async def test_a_platform_has_so_many_slots_and_no_two_volumes_share_one(provider, owner, ask):
    await provider.ensure_platform(ask())
    slots = set()
    for number in range(VOLUME_SLOTS):
        other = Owner(provider.volumes, owner.host, replace(SPEC, name=f"v{number}"))
        await other.serve()
        slots.add((await other.do("attach", "p1")).slot)
    assert slots == set(range(1, VOLUME_SLOTS + 1))
    await owner.serve()
    with pytest.raises(NoResources):
        await owner.do("attach", "p1")
    await provider.volumes.detach(owner.host, "v3")
    assert (await owner.do("attach", "p1")).slot in slots
