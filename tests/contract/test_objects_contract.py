"""What every provider's object stores keep to."""

import asyncio
import base64
import os
import time
from dataclasses import replace

import pytest

from supercloud.model.errors import Invalid, NoResources, NotFound, SupercloudError
from supercloud.model.states import STORE as STATES
from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.objects import (
    STORE,
    BucketSpec,
    ObjectsApply,
    ObjectsCredentials,
)
from support.providers import KINDS, PRETENDED, REAL

MIB = 1 << 20
PHOTOS = BucketSpec(name="photos", quota_bytes=32 * MIB)
NOTES = BucketSpec(name="notes", quota_bytes=8 * MIB, versioning=True, expire_days=7)


@pytest.fixture(params=[*PRETENDED, REAL])
async def provider(request, tmp_path, link):
    async with KINDS[request.param](request, tmp_path, link) as made:
        yield made
        host = (await made.hosts())[0].name
        await made.objects.delete(host)


class Owner:
    """Keeps what a control plane keeps of a store, and asks for it."""

    def __init__(self, objects, host, link):
        self.objects, self.host, self.link = objects, host, link
        key = base64.b64encode(os.urandom(32)).decode()
        self.asked = ObjectsApply(
            capacity_bytes=64 * MIB, key_base64=key, buckets=[PHOTOS], tag="supercloud:demo"
        )

    async def apply(self, **changes):
        """Until it serves."""
        asked = self.asked = replace(self.asked, **changes)
        status = await self.objects.apply(self.host, asked)
        if status.csr_pem:
            identity = Identity(self.link.ucloud, SERVICE, STORE)
            made = self.link.authority.issue(status.csr_pem, identity)
            asked = replace(asked, cert_pem=made.cert_pem, chain_pem=made.chain_pem)
            status = await self.objects.apply(self.host, asked)
        end_s = time.monotonic() + 120
        while status.state in ("starting", "restarting"):
            assert time.monotonic() < end_s, status
            await asyncio.sleep(0.1)
            status = await self.objects.apply(self.host, asked)
        return status

    async def credentials(self, name, **buckets):
        asked = ObjectsCredentials(name=name, buckets=buckets)
        return await self.objects.credentials(self.host, asked)


@pytest.fixture
async def owner(provider, link):
    return Owner(provider.objects, (await provider.hosts())[0].name, link)


async def test_a_provider_says_that_it_has_object_stores(provider):
    assert (await provider.features())["objects"] == ""
    assert provider.objects is not None
    assert {state for _, s in await provider.services() for state in [s.state]} <= {
        "running", "not running",
    }  # fmt: skip


async def test_there_is_none_until_it_is_asked_for(owner):
    assert (await owner.objects.state(owner.host)).state == "absent"
    assert (await owner.objects.stop(owner.host)).state == "absent"
    assert (await owner.objects.delete(owner.host)).state == "absent"
    with pytest.raises(NotFound):
        await owner.credentials("web", photos="read")


async def test_it_does_not_serve_without_a_certificate(owner):
    status = await owner.objects.apply(owner.host, owner.asked)
    assert "CERTIFICATE REQUEST" in status.csr_pem
    assert status.state in STATES
    assert status.state != "ready"
    assert (await owner.apply()).state == "ready"


async def test_what_is_asked_for_again_is_there_and_others_stay(owner):
    await owner.apply()
    status = await owner.apply(buckets=[NOTES])
    rows = {row.name: row for row in status.buckets}
    assert rows.keys() == {"photos", "notes"}
    assert (rows["notes"].versioning, rows["notes"].expire_days) == (True, 7)
    again = await owner.apply()
    assert again.position == status.position
    assert again.tag == "supercloud:demo"


async def test_credentials_are_the_same_until_they_are_revoked(owner):
    await owner.apply(users=["web"])
    first = await owner.credentials("web", photos="write")
    assert await owner.credentials("web", photos="read") == first
    assert (await owner.credentials("other", photos="read")).access_key != first.access_key
    with pytest.raises(Invalid):
        await owner.credentials("web", absent="read")
    await owner.apply(users=["web"])  # the other is revoked
    assert await owner.credentials("web", photos="write") == first


async def test_a_bucket_goes_and_who_used_it_stays(owner):
    await owner.apply(buckets=[PHOTOS, NOTES], users=["web"])
    await owner.credentials("web", photos="write", notes="read")
    for _ in range(2):
        status = await owner.objects.delete(owner.host, "notes")
        assert [row.name for row in status.buckets] == ["photos"]
    await owner.credentials("web", photos="write")


async def test_stopped_its_position_is_kept_and_an_older_one_refused(owner):
    await owner.apply()
    for _ in range(2):
        stopped = await owner.objects.stop(owner.host)
        assert stopped.state == "stopped"
    assert stopped.position.segment > 0
    assert (await owner.apply(least=stopped.position)).state == "ready"
    await owner.objects.stop(owner.host)
    with pytest.raises(SupercloudError, match="rolled back"):
        await owner.apply(least=replace(stopped.position, segment=99))
    assert (await owner.apply(least=stopped.position)).state == "ready"


async def test_another_key_opens_nothing(owner):
    await owner.apply()
    await owner.objects.stop(owner.host)
    with pytest.raises(SupercloudError):
        await owner.apply(key_base64=base64.b64encode(bytes(32)).decode())


async def test_refusals_come_before_any_effect(owner):
    with pytest.raises(NoResources):
        await owner.apply(capacity_bytes=12 << 40)
    with pytest.raises(Invalid):
        await owner.apply(capacity_bytes=MIB)
    assert (await owner.objects.state(owner.host)).state == "absent"


async def test_deleted_it_is_gone_with_all_that_was_in_it(owner):
    await owner.apply()
    for _ in range(2):
        assert (await owner.objects.delete(owner.host)).state == "absent"
    key = base64.b64encode(os.urandom(32)).decode()
    status = await owner.apply(key_base64=key, buckets=[])
    assert (status.state, status.buckets) == ("ready", [])
