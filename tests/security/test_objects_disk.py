"""What the provider's disk shows of objects, what it may do to them, and what a crash may."""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from supercloud.model.errors import Permanent
from support.object_store import (
    KEY,
    MIB,
    ObjectStore,
    client_of,
    eventually,
    object_store,
    plain_weed,
)
from support.search import shown

pytestmark = pytest.mark.root
CONTENT = b"PLAINTEXT-THAT-NOBODY-MAY-SEE-"
NAME = "invoices-of-the-red-house"
BUCKET = "ledger-of-the-red-house"
USER = "clerk-of-the-red-house"


def client(store: ObjectStore, bucket: str = BUCKET, **more: Any) -> Any:
    store.call("bucket.apply", {"name": bucket, "quota_bytes": 256 * MIB, "versioning": False})
    return store.client(store.credentials(USER, {bucket: "write"}), **more)


def store_known_objects(s3: Any) -> None:
    """Words that are searched for, in all the ways that objects are made.

    Most of it is random, so that it is found in what is not encrypted, compressed or not.
    """
    for number in range(20):
        body = os.urandom(100) + CONTENT + os.urandom(100 << number % 10)
        s3.put_object(Bucket=BUCKET, Key=f"{NAME}/{number}.bin", Body=body, Metadata={"of": NAME})
    text = {"Body": CONTENT * 5000, "ContentType": "text/plain"}
    s3.put_object(Bucket=BUCKET, Key=f"{NAME}/text", **text)
    big = b"".join(os.urandom(64 << 10) + CONTENT for _ in range(160))
    s3.put_object(Bucket=BUCKET, Key=f"{NAME}/big", Body=big)
    upload = {"Bucket": BUCKET, "Key": f"{NAME}/part"}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    s3.upload_part(**upload, PartNumber=1, Body=big)
    s3.delete_object(Bucket=BUCKET, Key=f"{NAME}/3.bin")
    with pytest.raises(ClientError):  # what is said of errors has names in it
        s3.get_object(Bucket=BUCKET, Key=f"{NAME}/absent")


def test_neither_contents_nor_names_are_on_the_providers_disk_or_in_the_log(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        s3 = client(store)
        store_known_objects(s3)
        store.call("bucket.apply", {"name": BUCKET, "quota_bytes": 256 * MIB, "expire_days": 3})
        secret = store.credentials(USER, {BUCKET: "write"})
        store.kill()
        store.launch()
        store.start()
        assert CONTENT in s3.get_object(Bucket=BUCKET, Key=f"{NAME}/5.bin")["Body"].read()
        store.stop()
    known = [CONTENT, NAME.encode(), BUCKET.encode(), USER.encode(), b"red-house"]
    known += [KEY, KEY.hex().encode(), secret["secret_key"].encode()]
    assert sum(path.stat().st_size for path in store.data.rglob("*") if path.is_file()) > 20 * MIB
    assert shown(store.data, known) == {}
    assert not [word for word in known if word in store.log.read_bytes()]


def test_that_search_finds_what_plain_weed_shows(tmp_path: Path) -> None:
    with plain_weed(tmp_path / "plain") as (endpoint, secret):
        s3 = client_of(endpoint, secret)
        eventually(lambda: s3.create_bucket(Bucket=BUCKET))
        eventually(lambda: s3.put_object(Bucket=BUCKET, Key="ready", Body=b"1"))
        eventually(lambda: store_known_objects(s3))
    assert set(shown(tmp_path / "plain", [CONTENT, NAME.encode(), BUCKET.encode()])) == {
        CONTENT,
        NAME.encode(),
        BUCKET.encode(),
    }


@pytest.mark.timeout(600)
def test_acknowledged_objects_survive_twenty_kills_byte_for_byte(tmp_path: Path) -> None:
    """Each round: four writers, a kill of everything at once, and all that was acknowledged."""
    rounds, acknowledged = 20, dict[str, bytes]()
    with object_store(tmp_path) as store:
        s3 = client(store)
        for number in range(rounds):
            before = len(acknowledged)

            def write(writer: int, number: int = number) -> None:
                for index in range(1000):
                    key = f"r{number}/w{writer}/{index}"
                    body = os.urandom(1 + (index * 7919) % 20_000)
                    try:
                        s3.put_object(Bucket=BUCKET, Key=key, Body=body)
                    except Exception:
                        return
                    acknowledged[key] = body

            with ThreadPoolExecutor(4) as pool:
                writers = [pool.submit(write, writer) for writer in range(4)]
                deadline_s = time.monotonic() + 60
                while len(acknowledged) < before + 12 + number:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.005)
                store.kill()
                for writer in writers:
                    writer.result()
            store.launch()
            store.start()
            for key in [*acknowledged][before:]:
                found = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
                assert found == acknowledged[key], f"round {number}, {key}"
        for key, body in acknowledged.items():
            assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == body, key
    assert len(acknowledged) >= 12 * rounds


def test_each_durable_put_flushes_its_volume_and_the_journal(tmp_path: Path) -> None:
    counts = {durable: _flushes_of(tmp_path / str(durable), durable) for durable in (True, False)}
    volume, journal, puts = counts[True]
    assert volume >= puts, "the content"
    assert journal >= puts, "its name and key"
    assert counts[False][0] < puts, "the setting is what makes it"


def _flushes_of(place: Path, durable: bool) -> tuple[int, int, int]:
    """(flushes of volumes, of the journal, PUTs), one PUT at a time."""
    place.mkdir()
    puts = 20
    with object_store(place, durable=durable) as store:
        s3 = client(store)
        s3.put_object(Bucket=BUCKET, Key="first", Body=b"1")
        pids = [store.process.pid, store.call("objects.state")["pid"]]
        trace = place / "trace"
        command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace)]
        tracer = subprocess.Popen(
            [*command, *(f"-p{pid}" for pid in pids)], stderr=subprocess.PIPE, text=True
        )
        for line in tracer.stderr or ():
            if line.count("attached") and str(pids[1]) in line:
                break
        for number in range(puts):
            s3.put_object(Bucket=BUCKET, Key=f"k{number}", Body=os.urandom(4096))
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=60)
        lines = trace.read_text().splitlines()
    calls = [line for line in lines if re.search(r"f(data)?sync\(\d+<", line)]
    volume = sum("/volumes/" in line and ".dat>" in line for line in calls)
    return volume, sum("/journal/" in line for line in calls), puts


def test_what_the_provider_alters_is_refused(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        s3 = client(store, attempts=1)  # weed itself reads again, for a while
        body = os.urandom(MIB)
        s3.put_object(Bucket=BUCKET, Key="k", Body=body)
        store.stop()
        volume = next((store.data / "volumes").glob("*.dat"))
        content = bytearray(volume.read_bytes())
        content[len(content) // 2] ^= 1
        volume.write_bytes(content)
        store.launch()
        store.start()
        try:
            answer = s3.get_object(Bucket=BUCKET, Key="k")["Body"].read()
        except Exception:
            answer = b""
        assert answer != body
        assert not answer.startswith(body[: MIB // 2 + 8192])


def test_another_key_an_altered_and_an_older_journal_are_refused(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        client(store).put_object(Bucket=BUCKET, Key="k", Body=b"1")
        journal = store.data / "journal"
        early = {path.name: path.read_bytes() for path in journal.iterdir()}
        client(store).put_object(Bucket=BUCKET, Key="k", Body=b"2")
        reached = store.call("objects.state")["position"]
        store.stop()
        store.launch()
        with pytest.raises(Permanent, match="another key"):
            store.start(key=bytes(32))
        store.end()
        late = {path.name: path.read_bytes() for path in journal.iterdir()}
        for name, content in early.items():
            (journal / name).write_bytes(content)
        store.launch()
        with pytest.raises(Permanent, match="rolled back"):
            store.start(least=reached)
        for name, content in late.items():
            (journal / name).write_bytes(content)
        store.start(least=reached)
        store.kill()


def test_no_start_goes_on_from_an_earlier_raft_state(tmp_path: Path) -> None:
    """It would be the provider's to alter, and now and then takes long to take up again."""
    with object_store(tmp_path) as store:
        s3 = client(store)
        s3.put_object(Bucket=BUCKET, Key="k", Body=b"1")
        store.kill()
        (raft,) = (store.data / "volumes").glob("m[0-9]*")
        planted = raft / "planted"
        planted.write_bytes(b"")
        store.launch()
        store.start()
        assert not planted.exists()
        assert s3.get_object(Bucket=BUCKET, Key="k")["Body"].read() == b"1"


def listening(process: int | str) -> set[int]:
    """TCP ports of its network namespace."""
    return {
        int(line.split()[1].rpartition(":")[2], 16)
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }


def test_only_the_s3_port_can_be_reached(tmp_path: Path) -> None:
    """The filer answers without credentials, but nobody outside gets at it."""
    import socket

    with object_store(tmp_path) as store:
        weed = store.call("objects.state")["pid"]
        assert os.readlink(f"/proc/{weed}/ns/net") != os.readlink("/proc/self/ns/net")
        interfaces = Path(f"/proc/{weed}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        inside = listening(weed)
        assert {port + store.shift for port in (8333, 8888, 9333)} <= inside
        for port in inside - listening("self"):  # others may have the same numbers out here
            with socket.socket() as probe:
                refused = probe.connect_ex(("127.0.0.1", port))
            assert refused or port in listening("self"), port
        s3 = client(store)
        for bucket, key in (("etc", "seaweedfs/filer.conf"), ("supercloud-ready", "ready")):
            with pytest.raises(ClientError):
                s3.get_object(Bucket=bucket, Key=key)
