"""The object service by a real S3 client: what it does, and what it holds to."""

import http.client
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import urandom
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from supercloud.model.errors import BadState, Busy, Exists, Invalid, NoResources, NotFound
from supercloud.services.checkpoint.s3 import S3, Bucket
from support.object_store import MIB, ObjectStore, make_identity, memory, object_store

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("objects")) as running:
        yield running


def bucket(store: ObjectStore, name: str, quota_bytes: int = 64 * MIB, **more: Any) -> Any:
    """A bucket of that name, and a client that may write it."""
    store.call("bucket.apply", {"name": name, "quota_bytes": quota_bytes, **more})
    return store.client(store.credentials(f"user-{name}", {name: "write"}))


def row(store: ObjectStore, name: str) -> Any:
    return next(row for row in store.call("bucket.list") if row["name"] == name)


def refused(action: Any, *codes: str) -> None:
    with pytest.raises(ClientError) as caught:
        action()
    assert caught.value.response["Error"]["Code"] in codes


def test_objects_of_many_sizes_come_back_as_they_were(store: ObjectStore) -> None:
    s3 = bucket(store, "sizes")
    for size in (0, 1, 4096, 65537, 5 * MIB + 3):
        body = urandom(size)
        s3.put_object(Bucket="sizes", Key=f"of/{size}", Body=body, Metadata={"size": str(size)})
        answer = s3.get_object(Bucket="sizes", Key=f"of/{size}")
        assert answer["Body"].read() == body
        assert answer["Metadata"] == {"size": str(size)}
        if size > 10:
            part = s3.get_object(Bucket="sizes", Key=f"of/{size}", Range="bytes=3-9")
            assert part["Body"].read() == body[3:10]
    listed = s3.list_objects_v2(Bucket="sizes", Prefix="of/")["Contents"]
    assert sorted(entry["Size"] for entry in listed) == [0, 1, 4096, 65537, 5 * MIB + 3]


def test_versions_are_kept(store: ObjectStore) -> None:
    s3 = bucket(store, "versions", versioning=True)
    first = s3.put_object(Bucket="versions", Key="k", Body=b"one")["VersionId"]
    s3.put_object(Bucket="versions", Key="k", Body=b"two")
    s3.delete_object(Bucket="versions", Key="k")
    refused(lambda: s3.get_object(Bucket="versions", Key="k"), "NoSuchKey")
    old = s3.get_object(Bucket="versions", Key="k", VersionId=first)
    assert old["Body"].read() == b"one"
    store.call("bucket.apply", {"name": "versions", "quota_bytes": MIB, "versioning": False})
    assert s3.get_bucket_versioning(Bucket="versions")["Status"] == "Suspended"


def test_an_expiry_is_a_lifecycle_rule_and_goes_again(store: ObjectStore) -> None:
    s3 = bucket(store, "expiring", expire_days=7, versioning=True)
    rules = s3.get_bucket_lifecycle_configuration(Bucket="expiring")["Rules"]
    assert [rule["Expiration"]["Days"] for rule in rules] == [7]
    assert rules[0]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
    s3.put_object(Bucket="expiring", Key="k", Body=b"kept until then")
    store.call("bucket.apply", {"name": "expiring", "quota_bytes": MIB, "versioning": True})
    refused(
        lambda: s3.get_bucket_lifecycle_configuration(Bucket="expiring"),
        "NoSuchLifecycleConfiguration",
    )


def test_multipart_uploads(store: ObjectStore) -> None:
    s3 = bucket(store, "parts")
    upload = s3.create_multipart_upload(Bucket="parts", Key="whole")["UploadId"]
    bodies = [urandom(5 * MIB), urandom(5 * MIB), urandom(1000)]
    parts = []
    for number, body in enumerate(bodies, 1):
        which = {"UploadId": upload, "PartNumber": number}
        tag = s3.upload_part(Bucket="parts", Key="whole", Body=body, **which)["ETag"]
        parts.append({"PartNumber": number, "ETag": tag})
    s3.complete_multipart_upload(
        Bucket="parts", Key="whole", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    assert s3.get_object(Bucket="parts", Key="whole")["Body"].read() == b"".join(bodies)
    assert row(store, "parts")["content_bytes"] == sum(map(len, bodies))
    left = s3.create_multipart_upload(Bucket="parts", Key="left")["UploadId"]
    s3.upload_part(Bucket="parts", Key="left", UploadId=left, PartNumber=1, Body=bodies[0])
    s3.abort_multipart_upload(Bucket="parts", Key="left", UploadId=left)
    assert row(store, "parts")["content_bytes"] == sum(map(len, bodies))


def test_conditional_writes(store: ObjectStore) -> None:
    s3 = bucket(store, "conditions")
    tag = s3.put_object(Bucket="conditions", Key="k", Body=b"1", IfNoneMatch="*")["ETag"]
    again = {"Bucket": "conditions", "Key": "k", "Body": b"2"}
    refused(lambda: s3.put_object(**again, IfNoneMatch="*"), "PreconditionFailed")
    s3.put_object(**again, IfMatch=tag)
    refused(lambda: s3.put_object(**again, IfMatch=tag), "PreconditionFailed")


def test_a_presigned_address_is_enough_to_read_and_is_no_more(
    store: ObjectStore,
) -> None:
    s3 = bucket(store, "presigned")
    s3.put_object(Bucket="presigned", Key="a b+c", Body=b"here")
    url = s3.generate_presigned_url("get_object", Params={"Bucket": "presigned", "Key": "a b+c"})
    trusting = ssl.create_default_context(cafile=str(store.identity))
    with urllib.request.urlopen(url, context=trusting) as answer:
        assert answer.read() == b"here"
    for changed in (url[:-4] + "0000", url.replace("a%20b", "b%20b"), url.partition("?")[0]):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(changed, context=trusting)
        assert caught.value.code == 403


def test_streams_without_a_known_length(store: ObjectStore) -> None:
    """boto3 sends these in signed chunks with a trailer."""
    s3 = bucket(store, "streams")

    class Stream:
        def __init__(self) -> None:
            self.left = [urandom(MIB) for _ in range(3)]
            self.all = b"".join(self.left)

        def read(self, _size: int = -1) -> bytes:
            return self.left.pop(0) if self.left else b""

    stream = Stream()
    s3.put_object(Bucket="streams", Key="k", Body=stream, ContentLength=3 * MIB)
    assert s3.get_object(Bucket="streams", Key="k")["Body"].read() == stream.all


def test_wrong_credentials_other_buckets_and_configuration_are_refused(
    store: ObjectStore,
) -> None:
    mine, theirs = bucket(store, "mine"), bucket(store, "theirs")
    theirs.put_object(Bucket="theirs", Key="k", Body=b"private")
    secret = store.credentials("user-mine", {"mine": "write"})
    wrong = store.client(secret | {"secret_key": "x" * 40})
    unknown = store.client(secret | {"access_key": "SCNOBODY"})
    refused(lambda: wrong.list_objects_v2(Bucket="mine"), "SignatureDoesNotMatch")
    refused(lambda: unknown.list_objects_v2(Bucket="mine"), "InvalidAccessKeyId")
    refused(lambda: mine.get_object(Bucket="theirs", Key="k"), "AccessDenied")
    refused(lambda: mine.list_objects_v2(Bucket="theirs"), "AccessDenied")
    copy = {"Bucket": "mine", "Key": "stolen", "CopySource": "theirs/k"}
    refused(lambda: mine.copy_object(**copy), "AccessDenied")
    refused(lambda: mine.get_object(Bucket="nowhere", Key="k"), "NoSuchBucket")
    refused(lambda: mine.create_bucket(Bucket="new-one"), "AccessDenied")
    refused(lambda: mine.delete_bucket(Bucket="mine"), "AccessDenied")
    versioning = {"Status": "Suspended"}
    refused(
        lambda: mine.put_bucket_versioning(Bucket="mine", VersioningConfiguration=versioning),
        "AccessDenied",
    )
    refused(lambda: mine.delete_bucket_lifecycle(Bucket="mine"), "AccessDenied")
    refused(lambda: mine.put_bucket_policy(Bucket="mine", Policy="{}"), "AccessDenied")
    assert [b["Name"] for b in mine.list_buckets()["Buckets"]] == ["mine"]


def test_a_user_who_is_called_as_the_service_is_not_it(store: ObjectStore) -> None:
    bucket(store, "of-root")
    named = store.client(store.credentials("supercloud-root", {}))
    refused(lambda: named.list_objects_v2(Bucket="of-root"), "AccessDenied")
    assert store.call("bucket.apply", {"name": "of-root", "quota_bytes": MIB, "expire_days": 1})


def test_readers_only_read_and_who_is_revoked_or_renewed_is_out(store: ObjectStore) -> None:
    writer = bucket(store, "shared")
    writer.put_object(Bucket="shared", Key="k", Body=b"1")
    reader = store.client(store.credentials("reader", {"shared": "read"}))
    assert reader.get_object(Bucket="shared", Key="k")["Body"].read() == b"1"
    refused(lambda: reader.put_object(Bucket="shared", Key="k", Body=b"2"), "AccessDenied")
    refused(lambda: reader.delete_object(Bucket="shared", Key="k"), "AccessDenied")
    renewed = store.client(store.credentials("reader", {"shared": "read"}, generation=2))
    assert renewed.get_object(Bucket="shared", Key="k")["Body"].read() == b"1"
    refused(lambda: reader.get_object(Bucket="shared", Key="k"), "InvalidAccessKeyId")
    store.call("objects.revoke", {"name": "reader"})
    store.call("objects.revoke", {"name": "reader"})
    refused(lambda: renewed.get_object(Bucket="shared", Key="k"), "InvalidAccessKeyId")


def test_a_quota_is_hard_under_concurrency_and_its_refusal_is_clear(store: ObjectStore) -> None:
    s3, quota = bucket(store, "small", 10 * MIB), 10 * MIB

    def put(number: int) -> str:
        try:
            s3.put_object(Bucket="small", Key=f"k{number}", Body=urandom(MIB))
        except ClientError as error:
            assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 403
            assert "quota" in error.response["Error"]["Message"]
            return str(error.response["Error"]["Code"])
        return "stored"

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(put, range(24)))
    assert set(answers) == {"stored", "QuotaExceeded"}
    stored = [f"k{n}" for n, answer in enumerate(answers) if answer == "stored"]
    assert len(stored) == 9, "as many as fit, with their records"
    listed = s3.list_objects_v2(Bucket="small")["Contents"]
    assert {entry["Key"] for entry in listed} == set(stored)
    assert row(store, "small")["content_bytes"] == len(stored) * MIB
    assert row(store, "small")["charged_bytes"] <= quota
    s3.delete_object(Bucket="small", Key=stored[0])
    assert put(99) == "stored"
    store.call("bucket.apply", {"name": "small", "quota_bytes": 12 * MIB})
    assert put(100) == "stored"


def test_a_checkpoint_for_which_there_is_no_room_says_so(store: ObjectStore) -> None:
    bucket(store, "kept", 4 * MIB)
    context = ssl.create_default_context(cafile=str(store.identity))
    credentials = store.credentials("user-kept", {"kept": "write"})
    keys = {name: credentials[name] for name in ("access_key", "secret_key", "region")}
    s3 = S3(Bucket(endpoint=store.endpoint(), name="kept", context=context, **keys))
    s3.put("packs/a", urandom(3 * MIB))
    with pytest.raises(NoResources, match="bucket is full") as caught:
        s3.put("packs/b", urandom(2 * MIB))
    assert "capacity" in str(caught.value.hint)
    assert len(s3.get("packs/a")) == 3 * MIB
    s3.close()


def test_no_other_way_to_write_gets_past_the_quota(store: ObjectStore) -> None:
    s3 = bucket(store, "tight", 4 * MIB, versioning=True)
    s3.put_object(Bucket="tight", Key="k", Body=urandom(3 * MIB))
    place = {"Bucket": "tight", "Key": "k"}
    refused(lambda: s3.put_object(**place, Body=urandom(2 * MIB)), "QuotaExceeded")
    source = {"Bucket": "tight", "Key": "k"}
    refused(lambda: s3.copy_object(Bucket="tight", Key="l", CopySource=source), "QuotaExceeded")
    upload = s3.create_multipart_upload(**place)["UploadId"]
    part = {**place, "UploadId": upload, "PartNumber": 1}
    refused(lambda: s3.upload_part(**part, Body=urandom(2 * MIB)), "QuotaExceeded")
    refused(lambda: s3.upload_part_copy(**part, CopySource=source), "QuotaExceeded")
    s3.abort_multipart_upload(**place, UploadId=upload)
    assert row(store, "tight")["content_bytes"] == 3 * MIB
    refused(
        lambda: s3.put_object(Bucket="tight", Key="x" * 500, Body=urandom(MIB)), "QuotaExceeded"
    )


def test_a_body_in_chunks_of_http_is_counted_as_it_comes(store: ObjectStore) -> None:
    s3 = bucket(store, "chunked", 2 * MIB)
    url = s3.generate_presigned_url("put_object", Params={"Bucket": "chunked", "Key": "k"})
    trusting = ssl.create_default_context(cafile=str(store.identity))

    def put(blocks: int) -> tuple[int, bytes]:
        host = url.split("/")[2]
        connection = http.client.HTTPSConnection(host, context=trusting, timeout=60)
        try:
            body = (urandom(64 << 10) for _ in range(blocks))
            connection.request("PUT", "/" + url.split("/", 3)[3], body, encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})  # fmt: skip
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    status, answer = put(64)
    assert status == 403
    assert b"QuotaExceeded" in answer
    assert row(store, "chunked")["content_bytes"] == 0
    assert put(8)[0] == 200
    assert row(store, "chunked")["content_bytes"] == 8 * (64 << 10)


def test_a_bucket_is_deleted_when_it_is_empty_and_unused(store: ObjectStore) -> None:
    s3 = bucket(store, "passing")
    s3.put_object(Bucket="passing", Key="k", Body=b"1")
    with pytest.raises(Exists, match="user-passing"):
        store.call("bucket.delete", {"name": "passing"})
    with_others = {"name": "user-passing", "buckets": {}}
    store.credentials(**with_others)
    with pytest.raises(BadState, match="not empty"):
        store.call("bucket.delete", {"name": "passing"})
    again = store.client(store.credentials("user-passing", {"passing": "write"}))
    again.delete_object(Bucket="passing", Key="k")
    store.call("objects.revoke", {"name": "user-passing"})
    store.call("bucket.delete", {"name": "passing"})
    store.call("bucket.delete", {"name": "passing"})
    assert "passing" not in {row["name"] for row in store.call("bucket.list")}


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"name": "UPPER"}, Invalid),
        ({"name": "ab"}, Invalid),
        ({"name": "supercloud-ready"}, Invalid),
        ({"quota_bytes": -1}, Invalid),
        ({"quota_bytes": 2048 * MIB}, NoResources),
        ({"versioning": "yes"}, Invalid),
        ({"expire_days": 100_000}, Invalid),
    ],
)
def test_buckets_that_cannot_be(store: ObjectStore, changed: Any, error: Any) -> None:
    with pytest.raises(error):
        store.call("bucket.apply", {"name": "possible", "quota_bytes": MIB, **changed})


@pytest.mark.parametrize(
    "parameters",
    [
        {"name": "u", "buckets": {"no-such": "read"}},
        {"name": "u", "buckets": {"mine": "admin"}},
        {"name": "u", "buckets": ["mine"]},
        {"name": "U/../x", "buckets": {}},
    ],
)
def test_credentials_that_cannot_be(store: ObjectStore, parameters: Any) -> None:
    with pytest.raises(Invalid):
        store.call("objects.credentials", parameters)


def test_weed_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    import os
    import signal

    with object_store(tmp_path) as store:
        s3 = bucket(store, "kept")
        s3.put_object(Bucket="kept", Key="k", Body=b"1")
        before = store.call("objects.state")
        os.kill(before["pid"], signal.SIGKILL)
        deadline_s = time.monotonic() + 60
        while store.call("objects.state")["pid"] in (0, before["pid"]):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert store.wait("ready")["pid"] != before["pid"]
        assert s3.get_object(Bucket="kept", Key="k")["Body"].read() == b"1"


def test_calls_before_the_start_and_bad_starts_are_refused(tmp_path: Path) -> None:
    with object_store(tmp_path, ready=False) as store:
        with pytest.raises((Busy, BadState)):
            store.call("objects.start", {})
        with pytest.raises(NotFound):
            store.call("objects.nothing")
        store.wait("ready")
    store.launch()
    try:
        with pytest.raises(BadState):
            store.call("objects.connect")
        with pytest.raises(Invalid, match="32"):
            store.start(key=b"short")
        with pytest.raises(Invalid, match="descriptors"):
            store.call("objects.start", {"directory": "/nowhere", "capacity_bytes": MIB})
    finally:
        store.close()


def test_a_bucket_goes_with_all_versions_and_unfinished_uploads_in_it(store: ObjectStore) -> None:
    s3 = bucket(store, "full", versioning=True)
    for number in range(210):  # more than are deleted in one call
        s3.put_object(Bucket="full", Key=f"a b/{number}&+<é>%20", Body=b"1")
    for body in (b"one", b"two"):
        s3.put_object(Bucket="full", Key="twice", Body=body)
    s3.delete_object(Bucket="full", Key="twice")
    s3.create_multipart_upload(Bucket="full", Key="never/finished")
    store.call("objects.revoke", {"name": "user-full"})
    with pytest.raises(BadState, match="not empty"):
        store.call("bucket.delete", {"name": "full"})
    rounds = 1
    while store.call("bucket.delete", {"name": "full", "contents": True})["left"]:
        rounds += 1
        assert rounds < 10
    assert rounds > 2
    assert "full" not in {row["name"] for row in store.call("bucket.list")}
    again = bucket(store, "full")
    assert "Contents" not in again.list_objects_v2(Bucket="full")
    assert row(store, "full")["charged_bytes"] < 4096


def certificate_of(store: ObjectStore, sock: socket.socket) -> str:
    context = ssl.create_default_context(cafile=str(store.identity))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(sock) as wrapped:
        shown = wrapped.getpeercert(binary_form=True)
        assert shown is not None
        return ssl.DER_cert_to_PEM_cert(shown)


def test_a_connection_may_be_given_and_another_certificate_presented(
    store: ObjectStore, tmp_path: Path
) -> None:
    def given() -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        with accepted:
            store.call("objects.accept", {}, [accepted.fileno()])
        return client

    before = certificate_of(store, given())
    other = make_identity(tmp_path)
    presented = memory(other.read_bytes())
    try:
        store.call("objects.present", {}, [presented])
    finally:
        os.close(presented)
    after = certificate_of(store, given())
    assert before != after
    assert after.strip() in other.read_text()
    assert before.strip() in store.identity.read_text()
    with pytest.raises(Invalid):
        store.call("objects.accept")
    wrong = memory(b"no identity")
    with pytest.raises(Invalid):
        store.call("objects.present", {}, [wrong])
    os.close(wrong)
    store.identity = other  # for clients of the tests that follow
