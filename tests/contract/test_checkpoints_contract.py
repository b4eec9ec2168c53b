"""What every provider's checkpoints of platforms, and their removal, keep to."""

import asyncio
import base64
import os
import time
from dataclasses import replace

import pytest

from supercloud.model.errors import NotFound, SupercloudError, Unsupported
from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.checkpoints import (
    BUCKET,
    CheckpointCollect,
    CheckpointTake,
    GoesBack,
    Head,
    Kept,
    RestoreFrom,
    StoreAccess,
)
from supercloud.wire.messages import Apply, EnvironmentSpec, ImageRef
from supercloud.wire.objects import STORE, BucketSpec, ObjectsApply, ObjectsCredentials
from supercloud.wire.volumes import Seal, VolumeOpen, VolumeSpec
from support.link import at_rendezvous
from support.providers import KINDS, PRETENDED

MIB = 1 << 20
SNAPSHOT = "supercloud-0123456789abcdef"
ENVIRONMENT = EnvironmentSpec(
    name="web", uid="web-1", kind="container", image=ImageRef(format="erofs", blobs={})
)


@pytest.fixture(params=PRETENDED)
async def provider(request, tmp_path, link):
    async with KINDS[request.param](request, tmp_path, link) as made:
        yield made
        host = (await made.hosts())[0].name
        await made.objects.delete(host)


@pytest.fixture
async def store(provider, link):
    """A store that serves, and the way into it."""
    host = (await provider.hosts())[0].name
    asked = ObjectsApply(
        capacity_bytes=256 * MIB,
        key_base64=base64.b64encode(os.urandom(32)).decode(),
        buckets=[BucketSpec(name=BUCKET, quota_bytes=256 * MIB)],
        users=["0-p1"],
        tag="supercloud:demo",
    )
    status = await provider.objects.apply(host, asked)
    identity = Identity(link.ucloud, SERVICE, STORE)
    if status.csr_pem:
        made = link.authority.issue(status.csr_pem, identity)
        asked = replace(asked, cert_pem=made.cert_pem, chain_pem=made.chain_pem)
    end_s = time.monotonic() + 120
    while status.state != "ready":
        assert time.monotonic() < end_s, status
        status = await provider.objects.apply(host, asked)
        await asyncio.sleep(0.05)
    wanted = ObjectsCredentials(name="0-p1", buckets={BUCKET: "write"})
    secret = await provider.objects.credentials(host, wanted)
    return StoreAccess(
        secret=os.urandom(32).hex(),
        server_name=identity.dns,
        ca_pem=link.authority.root_pem,
        access_key=secret.access_key,
        secret_key=secret.secret_key,
        region=secret.region,
    )


@pytest.fixture
async def running(provider, ask, link):
    """A platform with its agent; the request that made it, and the session."""
    async with at_rendezvous(provider, link.hub):
        asked = ask()
        await provider.ensure_platform(asked)
        yield asked, await link.owner.until("connected")


async def take(provider, asked, store, head=None, snapshot=""):
    wanted = CheckpointTake(name=asked.name, uid="i1", store=store, head=head, snapshot=snapshot)
    return await provider.checkpoints.take(asked.host, wanted)


async def test_a_provider_says_that_it_has_checkpoints(provider):
    assert (await provider.features())["checkpoints"] == ""
    assert provider.checkpoints is not None


async def test_one_follows_the_other_and_figures_are_told(provider, running, store):
    asked, _ = running
    before_ms = time.time() * 1000 - 60_000
    first = await take(provider, asked, store)
    second = await take(provider, asked, store, first.head)
    assert first.base
    assert second.head.sequence > first.head.sequence
    assert second.head.root != first.head.root
    for taken in (first, second):
        assert before_ms < taken.taken_ms < time.time() * 1000 + 60_000
        assert taken.pause_ms >= 0
        assert taken.memory_bytes > 0
        assert taken.engine


async def test_asked_for_again_after_the_same_head_it_is_another_one(provider, running, store):
    asked, _ = running
    first = await take(provider, asked, store)
    one = await take(provider, asked, store, first.head)
    other = await take(provider, asked, store, first.head)
    assert one.head.root != other.head.root


async def test_a_head_that_the_store_does_not_know_is_refused(provider, running, store):
    asked, _ = running
    await take(provider, asked, store)
    with pytest.raises(SupercloudError):
        await take(provider, asked, store, Head(sequence=7, root="0" * 64))


async def test_there_is_none_of_a_platform_that_is_not_there(provider, running, store):
    asked, _ = running
    with pytest.raises(NotFound):
        await take(provider, replace(asked, name="nobody"), store)


async def test_nothing_is_taken_with_keys_that_the_store_does_not_know(provider, running, store):
    asked, _ = running
    with pytest.raises(SupercloudError):
        await take(provider, asked, replace(store, secret_key="0" * 40))


async def test_a_platform_goes_on_from_one(provider, running, store, link):
    asked, session = running
    await session.apply(Apply(generation=1, environments=[ENVIRONMENT]))
    while not (await session.list()).environments:
        await asyncio.sleep(0.01)
    taken = await take(provider, asked, store)
    await session.apply(Apply(generation=2, environments=[]))
    await provider.delete_platform(asked.name)
    await link.owner.until("lost")
    restore = RestoreFrom(ee=asked.name, store=store, head=taken.head)
    for _ in range(2):  # it may be asked for again
        seen = await provider.ensure_platform(replace(asked, restore=restore))
        assert seen.name == asked.name
    again = await link.owner.until("connected")
    assert again.pin == session.pin, "it has its key with it"
    assert [item.uid for item in (await again.list()).environments] == ["web-1"]


async def test_its_volumes_go_back_with_it_into_their_slots(provider, running, store):
    asked, _ = running
    volumes, names = provider.volumes, ("data", "more")
    for name in names:
        spec = VolumeSpec(name=name, size_bytes=16 * MIB)
        key = base64.b64encode(bytes(32)).decode()
        opened = await volumes.open(asked.host, VolumeOpen(spec=spec, key_base64=key, seal=Seal()))
        await volumes.serve(asked.host, name, opened.seal.epoch)
    attached = [await volumes.attach(asked.host, n, asked.name, restorable=True) for n in names]
    slots = {status.name: status.slot for status in attached}
    assert [status.mode for status in attached] == ["nbd", "nbd"]
    with pytest.raises(Unsupported):
        await take(provider, asked, store)
    taken = await take(provider, asked, store, snapshot=SNAPSHOT)
    assert taken.slots == slots
    assert await there(volumes) == {n: ("attached", slots[n], [SNAPSHOT]) for n in names}
    await provider.delete_platform(asked.name)
    assert await there(volumes) == {n: ("served", 0, [SNAPSHOT]) for n in names}
    back = [GoesBack(volume=n, slot=slots[n], snapshot=SNAPSHOT) for n in reversed(names)]
    restore = RestoreFrom(ee=asked.name, store=store, head=taken.head, volumes=back)
    wrong = replace(restore, volumes=[back[0], replace(back[1], snapshot=SNAPSHOT[:-1] + "0")])
    with pytest.raises(NotFound):
        await provider.ensure_platform(replace(asked, restore=wrong))
    assert await there(volumes) == {n: ("served", 0, [SNAPSHOT]) for n in names}
    for _ in range(2):
        await provider.ensure_platform(replace(asked, restore=restore))
        assert await there(volumes) == {n: ("attached", slots[n], [SNAPSHOT]) for n in names}


async def there(volumes):
    """State, slot and snapshots of all."""
    listed = await volumes.list()
    return {status.name: (status.state, status.slot, status.snapshots) for _, status in listed}


async def test_an_older_one_is_restored_and_one_that_is_not_vouched_for_is_refused(
    provider, running, store
):
    asked, _ = running
    first = await take(provider, asked, store)
    second = await take(provider, asked, store, first.head)
    await provider.delete_platform(asked.name)
    older = RestoreFrom(ee=asked.name, store=store, head=second.head, sequence=first.head.sequence)
    for wrong in (
        replace(older, sequence=99),
        replace(older, ee="another"),
        replace(older, head=replace(second.head, root="0" * 64)),
        replace(older, store=replace(store, secret="0" * 64)),
    ):
        with pytest.raises(SupercloudError):
            await provider.checkpoints.verify(asked.host, wrong)
        with pytest.raises(SupercloudError):
            await provider.ensure_platform(replace(asked, restore=wrong))
        assert await provider.platforms() == []
    assert (await provider.checkpoints.verify(asked.host, older)).read_bytes
    await provider.ensure_platform(replace(asked, restore=older))


async def test_what_is_not_to_be_kept_is_removed(provider, running, store):
    asked, _ = running
    heads = []
    for _ in range(3):
        taken = await take(provider, asked, store, heads[-1] if heads else None)
        heads.append(taken.head)
    keep = Kept(head=heads[-1], sequences=[heads[0].sequence, heads[-1].sequence])
    for _ in range(2):
        collect = CheckpointCollect(store=store, keep={asked.name: keep})
        done = await provider.checkpoints.collect(asked.host, collect)
        assert done.state == "done"
    await provider.delete_platform(asked.name)
    of = RestoreFrom(ee=asked.name, store=store, head=heads[-1])
    with pytest.raises(SupercloudError):
        gone = replace(of, sequence=heads[1].sequence)
        await provider.ensure_platform(replace(asked, restore=gone))
    await provider.ensure_platform(replace(asked, restore=replace(of, sequence=heads[0].sequence)))
    await provider.delete_platform(asked.name)
    collect = CheckpointCollect(store=store, forget=[asked.name])
    assert (await provider.checkpoints.collect(asked.host, collect)).state == "done"
    with pytest.raises(SupercloudError):
        await provider.ensure_platform(replace(asked, restore=of))


async def test_who_is_in_no_list_is_left_alone(provider, running, store):
    asked, _ = running
    taken = await take(provider, asked, store)
    done = await provider.checkpoints.collect(asked.host, CheckpointCollect(store=store))
    assert (done.state, done.removed) == ("done", 0)
    assert (await take(provider, asked, store, taken.head)).head.sequence > taken.head.sequence
