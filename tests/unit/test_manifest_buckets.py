"""What a manifest may say of buckets, and how it is told what it may not; what they take."""

from pathlib import Path

import pytest

from supercloud.control.manifest import dump, parse
from supercloud.model.errors import Invalid
from supercloud.model.resources import GIB, MIB, Bucket, BucketUse
from supercloud.services.objects.weed import VOLUME_MIB
from supercloud.wire.objects import SPARE_VOLUMES, VOLUME_BYTES, booked_bytes
from support import oci

HEAD = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: u
providers: [{name: f, kind: fake}]
buckets:
  - {name: photos, quota: 1GiB}
  - {name: notes, quota: 64MiB, versioning: true, expire_days: 30}
"""
ENVIRONMENTS = "environments:\n"


@pytest.fixture
def images(tmp_path):
    oci.Layout(tmp_path / "web").write()
    (tmp_path / "disk.raw").write_bytes(b"\0")
    return tmp_path


def container(uses, name="web"):
    return f"  - {{name: {name}, kind: container, image: 'oci:web', buckets: [{uses}]}}\n"


def parsed(directory: Path, body: str, head: str = HEAD):
    return parse(head + ENVIRONMENTS + body, file="m.yaml", directory=directory)


def problems(directory: Path, body: str, head: str = HEAD) -> list[dict[str, str]]:
    with pytest.raises(Invalid) as caught:
        parsed(directory, body, head)
    return caught.value.details["errors"]


def test_buckets_and_who_uses_them(images):
    ucloud = parsed(images, container("{name: photos}, {name: notes, access: read}"))
    assert ucloud.buckets == [
        Bucket(name="photos", quota_bytes=GIB),
        Bucket(name="notes", quota_bytes=64 * MIB, versioning=True, expire_days=30),
    ]
    (web,) = ucloud.environments
    assert web.buckets == [BucketUse(name="photos"), BucketUse(name="notes", access="read")]
    assert parse(dump(ucloud), file="again.yaml", directory=images) == ucloud


@pytest.mark.parametrize(
    ("uses", "where", "message"),
    [
        ("{name: photo}", "buckets[0].name", "allowed is one of"),
        ("{name: photos}, {name: photos}", "buckets[1].name", "twice"),
        ("{name: photos, access: all}", "buckets[0].access", "allowed is"),
        ("{}", "buckets[0].name", "required"),
    ],
)
def test_a_wrong_use_is_told_at_its_place(images, uses, where, message):
    (error,) = problems(images, container(uses))
    assert where in error["where"]
    assert message in error["message"]


def test_a_virtual_machine_may_use_one_too(images):
    machine = "  - {name: db, kind: vm, image: disk.raw, buckets: [{name: photos}]}\n"
    (db,) = parsed(images, machine).environments
    assert db.buckets == [BucketUse(name="photos")]


@pytest.mark.parametrize(
    ("bucket", "where", "message"),
    [
        ("{name: photos, quota: 1MiB}", "buckets[2].name", "twice"),
        ("{name: Photos, quota: 1MiB}", "buckets[2].name", "3 to 63"),
        ("{name: ab, quota: 1MiB}", "buckets[2].name", "3 to 63"),
        ("{name: supercloud-ready, quota: 1MiB}", "buckets[2].name", "the store's own"),
        ("{name: tiny, quota: 1KiB}", "buckets[2].quota", "allowed"),
        ("{name: huge, quota: 8TiB}, {name: huger, quota: 8TiB}", "buckets[3].quota", "at most"),
        ("{name: none}", "buckets[2].quota", "required"),
        ("{name: late, quota: 1MiB, expire_days: 99999}", "buckets[2].expire_days", "allowed"),
    ],
)
def test_a_wrong_bucket_is_told_at_its_place(images, bucket, where, message):
    items = "".join(f"  - {{{item}}}\n" for item in bucket[1:-1].split("}, {"))
    errors = problems(images, container("{name: photos}"), HEAD + items)
    assert where in errors[0]["where"]
    assert message in errors[0]["message"]


def test_a_store_is_booked_with_all_volumes_that_its_server_may_make():
    assert VOLUME_BYTES == VOLUME_MIB * MIB
    for capacity in (MIB, 64 * MIB, GIB, 10 * GIB + 1):
        volumes = -(-capacity * 3 // 2 // VOLUME_BYTES) + SPARE_VOLUMES
        booked = booked_bytes(capacity)
        assert booked % 4096 == 0
        assert volumes * VOLUME_BYTES < booked < volumes * VOLUME_BYTES + 65 * MIB + capacity // 4
