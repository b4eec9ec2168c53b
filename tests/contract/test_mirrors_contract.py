"""What every provider's mirrors keep to: here of one replica, which needs no second host."""

import asyncio
import base64
import contextlib
import os

import pytest

from supercloud.model.errors import BadState, Denied, NotFound, Temporary
from supercloud.wire.mirrors import Mirror, Replica, Shared, VolumeFence, VolumeLease
from supercloud.wire.volumes import Seal, VolumeOpen, VolumeSpec
from support.providers import KINDS, PRETENDED

WITH_MIRRORS = [*PRETENDED, pytest.param("lower_layer", marks=[pytest.mark.root])]
SPEC = VolumeSpec(name="data", size_bytes=16 << 20)
KEY = base64.b64encode(os.urandom(32)).decode()


@pytest.fixture(params=WITH_MIRRORS)
async def provider(request, tmp_path, link):
    async with KINDS[request.param](request, tmp_path, link) as made:
        yield made
        for host, status in await made.volumes.list():
            await made.volumes.delete(host, status.name)


class Owner:
    """Opens the volume, and grants its leases."""

    def __init__(self, volumes, host):
        self.volumes, self.host, self.generation, self.seal = volumes, host, 0, Seal()

    async def opened(self):
        asked = VolumeOpen(spec=SPEC, key_base64=KEY, seal=self.seal)
        self.seal = (await self.volumes.open(self.host, asked)).seal

    async def mirrored(self, *, kept=True, **more):
        """A mirror that has no lease yet."""
        self.generation += 1
        replica = Replica(replica="r1", in_sync=True, kept=kept)
        self.mirror = Mirror(generation=self.generation, replicas=[replica], **more)
        return await self.serve()

    async def serve(self, **how):
        how = how or {"mirror": self.mirror}
        return await self.volumes.serve(self.host, "data", self.seal.epoch, **how)

    async def lease(self, stamp, valid_ms=5000, generation=0):
        generation = generation or self.generation
        asked = VolumeLease(name="data", generation=generation, stamp=stamp, valid_ms=valid_ms)
        return await self.volumes.lease(self.host, asked)

    async def used(self):
        await self.opened()
        status = await self.mirrored(clean=True, new=True)
        await self.lease(status.mirror.stamp)
        return await self.serve()


@pytest.fixture
async def owner(provider):
    return Owner(provider.volumes, (await provider.hosts())[0].name)


async def test_nothing_is_used_before_the_mirror_has_a_lease(owner):
    await owner.opened()
    made = await owner.mirrored(clean=True, new=True)
    assert (made.state, made.mirror.generation) == ("opened", 1)
    assert made.mirror.closed_by
    with pytest.raises(Temporary):
        await owner.serve()
    leased = await owner.lease(made.mirror.stamp)
    assert leased.closed_by == ""
    assert leased.left_ms > 0
    assert [one.standing for one in leased.replicas] == ["in_sync"]
    assert (await owner.serve()).state == "served"
    assert (await owner.serve()).state == "served"


async def test_a_lease_ends_and_can_be_renewed(owner):
    await owner.used()
    now = await owner.lease(0, valid_ms=0)
    await owner.lease(now.stamp, valid_ms=100)
    async with asyncio.timeout(30):
        while (now := await owner.lease(0, valid_ms=0)).closed_by != "no lease":
            await asyncio.sleep(0.05)
    assert (await owner.lease(now.stamp)).closed_by == ""


async def test_a_lease_of_an_older_or_newer_generation_is_refused(owner):
    served = await owner.used()
    for generation in (2,):
        with pytest.raises(Denied):
            await owner.lease(served.mirror.stamp, generation=generation)


async def test_fenced_it_never_answers_again(provider, owner):
    served = await owner.used()
    await owner.volumes.fence(owner.host, VolumeFence(name="data", generation=2))
    with pytest.raises((Denied, NotFound)):
        await owner.lease(served.mirror.stamp)
    async with asyncio.timeout(30):
        while (await provider.volumes.list())[0][1].state != "failed":
            await asyncio.sleep(0.05)


async def test_closed_in_order_it_is_clean_and_shows_its_seal_again(owner):
    await owner.used()
    closed = await owner.volumes.close(owner.host, "data")
    assert closed.mirror.clean
    assert closed.seal.root
    again = await owner.volumes.close(owner.host, "data")
    assert again.seal == closed.seal


async def test_it_begins_with_what_was_kept_or_when_all_were_ended(owner):
    await owner.opened()
    with pytest.raises(Temporary):
        await owner.mirrored(kept=False, new=True)
    assert (await owner.mirrored(kept=False, new=True, all_ended=True)).mirror.generation == 2


async def test_a_shared_one_is_used_by_nobody_here(provider, owner):
    await owner.opened()
    shared = Shared(host="other", generation=4)
    served = await owner.serve(shared=shared)
    assert (served.state, served.shared) == ("served", shared)
    with contextlib.suppress(NotFound), pytest.raises(BadState):
        await owner.volumes.attach(owner.host, "data", "nowhere")
    with pytest.raises(BadState):
        await owner.serve(shared=Shared(host="other", generation=5))
    closed = await owner.volumes.close(owner.host, "data")
    assert closed.shared is None
