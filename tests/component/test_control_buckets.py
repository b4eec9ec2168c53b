"""Buckets of a U-Cloud: made, used, kept, refused, deleted; on the fake provider."""

import datetime as dt
import json

import msgspec
import pytest

from supercloud.model.errors import BadState, Invalid, NoResources, NotFound, Unsupported
from supercloud.trust.authority import due_pem
from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.objects import STORE, booked_bytes
from support.control import World, environment, manifest_of

MIB = 1 << 20
PHOTOS = {"name": "photos", "quota": "64MiB"}
NOTES = {"name": "notes", "quota": "8MiB", "versioning": True, "expire_days": 30}
WEB = environment("web", buckets=[{"name": "photos"}])
READER = environment("reader", buckets=[{"name": "photos", "access": "read"}, {"name": "notes"}])
PLAIN = environment("web")


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


def manifest(world, wish=(WEB,), buckets=(PHOTOS,), **more):
    return manifest_of(world.directory, list(wish), buckets=list(buckets), **more)


async def up(world, wish=(WEB,), buckets=(PHOTOS,), **more):
    applied = await world.app.service.up(manifest(world, wish, buckets, **more))
    await world.ready()
    return applied


async def down(world, *, purge=False):
    service = world.app.service
    await (service.purge("test") if purge else service.down("test"))
    await world.gone()


async def document(world):
    return await world.app.plane.state.store_document("test")


async def host(world):
    store = await document(world)
    return world.app.plane.pool.get("test", store.provider).cloud.objects


async def told_spec(world, name="web"):
    """The EE as its platform was told of it."""
    for platform in world.platforms().values():
        for spec in platform["specs"]:
            if spec["name"] == name:
                return spec
    raise AssertionError(f"{name} is nowhere")


async def until(world, true, what):
    async def there():
        return true(await document(world))

    await world.until(there, what)
    return await document(world)


async def rows(world):
    return {row.name: row for row in await world.app.service.buckets.rows()}


async def test_up_makes_a_store_where_its_user_is_and_gives_the_user_its_keys(world):
    applied = await up(world)
    changes = {change.subject: change for change in applied.plan.changes}
    assert changes["bucket/photos"].action == "create"
    store = await document(world)
    assert changes["bucket/photos"].details == ["64MiB", f"at fake/{store.host}"]
    (row,) = await world.app.service.environments("test")
    assert (store.state, store.host) == ("ready", row.host)
    objects = (await told_spec(world))["objects"]
    assert objects["server_name"] == "objects.service.test.supercloud.internal"
    assert objects["ca_pem"] == world.app.authority("test").root_pem
    pretended = await host(world)
    assert pretended.stores[store.host].users == {"web": {"photos": "write"}}
    assert objects["access_key"] == store.access["web"].access_key
    assert objects["secret_key"]


async def test_a_machine_gets_keys_of_its_own(world):
    machine = environment("db", kind="vm", image="vm", buckets=[{"name": "photos"}])
    await up(world, [WEB, machine])
    told = {name: (await told_spec(world, name))["objects"] for name in ("web", "db")}
    assert told["db"]["server_name"] == told["web"]["server_name"]
    assert told["db"]["secret_key"] != told["web"]["secret_key"]
    pretended = await host(world)
    (store,) = pretended.stores.values()
    assert store.users == {"web": {"photos": "write"}, "db": {"photos": "write"}}


async def test_its_secrets_are_nowhere_to_be_read(world):
    await up(world)
    secret = (await told_spec(world))["objects"]["secret_key"]
    stored, _ = await world.app.store.list("")
    assert not any(secret.encode() in row.value for row in stored)
    service = world.app.service
    shown = [
        await service.environment("test", "web"),
        await service.ucloud("test"),
        await service.buckets.bucket("test", "photos"),
        await service.plan(manifest(world)),
        list(service.events.since()),
    ]
    assert secret not in msgspec.json.encode(shown).decode()


async def test_the_same_up_again_changes_nothing(world):
    await up(world)
    before = await told_spec(world)
    again = await world.app.service.up(manifest(world))
    assert again.plan.changes == []
    await world.ready()
    assert await told_spec(world) == before


async def test_buckets_and_access_change_under_what_runs(world):
    await up(world)
    before = await told_spec(world)
    larger = {**PHOTOS, "quota": "96MiB"}
    reading = environment("web", buckets=[{"name": "photos", "access": "read"}])
    applied = await up(world, [reading, READER], [larger, NOTES])
    changes = {change.subject: change for change in applied.plan.changes}
    assert changes["bucket/photos"].details == ["quota 64MiB -> 96MiB"]
    assert changes["bucket/notes"].action == "create"
    pretended = await host(world)
    store = await until(world, lambda d: d.access.keys() == {"web", "reader"}, "both are known")
    assert pretended.stores[store.host].capacity_bytes == 104 * MIB
    users = pretended.stores[store.host].users
    assert users["web"] == {"photos": "read"}
    assert users["reader"] == {"photos": "read", "notes": "write"}
    assert await told_spec(world) == before, "the same keys and the same EE"


async def test_who_is_no_more_is_revoked(world):
    await up(world, [WEB, READER], [PHOTOS, NOTES])
    pretended = await host(world)
    await up(world, [WEB], [PHOTOS, NOTES])
    store = await until(world, lambda d: d.access.keys() == {"web"}, "the other is forgotten")
    assert pretended.stores[store.host].users.keys() == {"web"}


async def test_all_that_use_buckets_are_on_one_host(world):
    replicas = environment("many", replicas=4, buckets=[{"name": "photos"}])
    await up(world, [replicas, WEB], options={"hosts": "3"})
    hosts = {row.host for row in await world.app.service.environments("test")}
    assert len(hosts) == 1
    spread = {**replicas, "placement": {"spread": "host"}}
    with pytest.raises(NoResources, match="buckets are at"):
        await world.app.service.plan(manifest(world, [spread], options={"hosts": "3"}))


async def test_down_keeps_them_and_up_finds_them(world):
    await up(world)
    pretended, store = await host(world), await document(world)
    secret = store.access["web"].access_key
    await down(world)
    store = await document(world)
    assert (store.state, store.running, store.access) == ("kept", False, {})
    assert not pretended.stores[store.host].running
    assert (await rows(world))["photos"].state == "kept"
    codes = [e.code for e in world.app.plane.events.since() if ".objects." in e.code]
    assert codes[-1] == "control.objects.kept"
    applied = await up(world)
    changes = {change.subject: change for change in applied.plan.changes}
    assert changes["bucket/photos"].details[0] == "the kept one, with its objects"
    assert (await document(world)).access["web"].access_key == secret
    assert sum((await host(world)).creations.values()) == 1


async def test_an_older_state_of_it_is_refused_and_said(world):
    await up(world)
    await down(world)
    pretended, store = await host(world), await document(world)
    there = pretended.stores[store.host]
    there.segment = 0
    await world.app.service.up(manifest(world))
    store = await until(world, lambda d: d.error is not None, "it is refused")
    assert "rolled back" in store.error["message"]
    assert "supercloud down test --volumes" in store.error["message"]

    async def degraded():
        return (await world.app.service.ucloud("test")).state == "degraded"

    await world.until(degraded, "its U-Cloud says so")


async def test_a_store_whose_service_died_is_started_again(world):
    await up(world)
    pretended, store = await host(world), await document(world)
    pretended.die(store.host)

    async def again():
        return pretended.stores[store.host].running

    await world.until(again, "it runs again")
    assert (await document(world)).position.segment >= 1


async def test_purge_takes_them_too(world):
    await up(world)
    pretended = await host(world)
    await down(world, purge=True)

    async def gone():
        return await document(world) is None

    await world.until(gone, "nothing is kept")
    assert pretended.stores == {}
    with pytest.raises(NotFound):
        await world.app.service.purge("test")


async def test_one_that_the_manifest_has_no_more_is_kept_until_it_is_deleted(world):
    await up(world, [WEB], [PHOTOS, NOTES])
    applied = await up(world)
    changes = {change.subject: change for change in applied.plan.changes}
    assert changes["bucket/notes"].details == [
        "is kept with its objects until supercloud buckets delete"
    ]
    buckets = world.app.service.buckets
    with pytest.raises(BadState, match="manifest"):
        await buckets.delete("test", "photos")
    await buckets.delete("test", "notes")
    await until(world, lambda d: d.buckets.keys() == {"photos"}, "it is gone")
    pretended, store = await host(world), await document(world)
    assert [spec.name for spec in pretended.stores[store.host].buckets] == ["photos"]
    with pytest.raises(NotFound):
        await buckets.delete("test", "notes")
    await until(world, lambda d: d.state == "ready", "the other serves")


async def test_one_is_deleted_while_its_u_cloud_is_down_and_the_last_takes_the_store(world):
    await up(world, [WEB], [PHOTOS, NOTES])
    await down(world)
    pretended = await host(world)
    buckets = world.app.service.buckets
    await buckets.delete("test", "notes")
    store = await until(
        world, lambda d: d.buckets.keys() == {"photos"} and not d.running, "one is gone"
    )
    assert [spec.name for spec in pretended.stores[store.host].buckets] == ["photos"]
    await buckets.delete("test", "photos")

    async def gone():
        return await document(world) is None

    await world.until(gone, "the store is gone")
    assert pretended.stores == {}


async def test_what_nobody_uses_is_not_made_and_that_is_said(world):
    applied = await up(world, [PLAIN])
    assert await document(world) is None
    assert any("buckets" in warning for warning in applied.plan.warnings)


async def test_refusals_come_before_any_effect_and_name_their_place(world):
    with pytest.raises(Unsupported, match="no store"):
        await world.app.service.up(manifest(world, options={"hosts": "1", "objects": "0"}))
    huge = {**PHOTOS, "quota": "1TiB"}
    with pytest.raises(NoResources, match="disk quota") as refused:
        await world.app.service.up(manifest(world, buckets=[huge]))
    assert refused.value.where.startswith("test.yaml:")
    with pytest.raises(Invalid, match="allowed is one of"):
        await world.app.service.up(manifest(world, buckets=[NOTES]))
    assert await document(world) is None


async def test_the_rotated_key_opens_it(world):
    await up(world)
    before = (await document(world)).wrapped_key
    await world.app.service.volumes.rotate_key("test")
    store = await document(world)
    assert store.wrapped_key.partition(":")[0] != before.partition(":")[0]
    await down(world)
    await up(world)
    assert (await told_spec(world))["objects"]["secret_key"]


async def test_its_certificate_is_signed_again_at_half_of_its_life(world):
    await up(world)
    store = await document(world)
    assert "CERTIFICATE REQUEST" in store.csr_pem
    old = world.app.authority("test").issue(
        store.csr_pem, Identity("test", SERVICE, STORE), dt.timedelta(minutes=2)
    )

    def grown_old(fresh):
        fresh.cert_pem = old.cert_pem

    await world.app.plane.state.change(store, grown_old)
    store = await until(world, lambda d: not due_pem(d.cert_pem), "there is another one")
    assert store.cert_pem not in ("", old.cert_pem)
    assert store.state == "ready"


async def test_a_control_plane_that_starts_anew_knows_its_keys(world):
    await up(world)
    before = await told_spec(world)
    await world.stop()
    await world.start()
    await world.ready()
    assert await told_spec(world) == before


async def test_rows_say_what_is_used(world):
    await up(world, [WEB, READER], [PHOTOS, NOTES])
    pretended, store = await host(world), await document(world)
    secret = (await told_spec(world))["objects"]
    from supercloud.wire.objects import ObjectsSecret

    keys = ObjectsSecret(
        access_key=secret["access_key"], secret_key=secret["secret_key"], region="fake"
    )
    pretended.put(store.host, keys, "photos", "one")

    async def counted():
        return (await rows(world))["photos"].entries == 1

    await world.until(counted, "the entry is counted")
    row = (await rows(world))["notes"]
    assert row.used_by == {"reader": "write"}
    assert (row.versioning, row.expire_days, row.quota_bytes) == (True, 30, 8 * MIB)
    view = await world.app.service.buckets.bucket("test", "photos")
    assert view.store_booked_bytes == booked_bytes(72 * MIB)
    (service,) = await world.app.service.buckets.services("test")
    assert (service.kind, service.state) == ("objects", "running")
    assert json.loads(msgspec.json.encode(view))["used_by"] == {"web": "write", "reader": "read"}


async def test_a_store_is_made_where_it_may_be_and_is_not_moved(world):
    options = {"hosts": "4", "regions": "north,west"}
    west = {"services": {"objects": {"region": "west"}}, "options": options}
    await up(world, [PLAIN, environment("logs", buckets=[{"name": "photos"}])], **west)
    hosts = {row.name: row.host for row in await world.app.service.environments("test")}
    store = await document(world)
    assert hosts["logs"] == store.host
    assert store.host in ("fake-1", "fake-3"), "the hosts of the second region"
    north = {"services": {"objects": {"region": "north"}}, "options": options}
    with pytest.raises(Invalid, match="wants region north, and the object store is at") as refused:
        await world.app.service.up(manifest(world, **north))
    assert refused.value.where.endswith(" services.objects")
    assert (await document(world)) == store


async def test_where_no_store_may_be_nothing_is_made(world):
    options = {"hosts": "2", "regions": "north,west"}
    south = {"services": {"objects": {"region": "south"}}, "options": options}
    with pytest.raises(NoResources, match=r"services\.objects wants region south"):
        await world.app.service.up(manifest(world, **south))
    nowhere = {"services": {"objects": {"provider": "another"}}}
    with pytest.raises(Invalid, match="allowed is one of"):
        await world.app.service.up(manifest(world, **nowhere))
    assert await document(world) is None
    assert not world.creations()
