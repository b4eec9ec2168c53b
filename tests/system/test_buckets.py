"""Buckets from a manifest to an S3 client in a container: a real host, platform, store and agent.

The client is a real one, in the test; its bytes go through the container, or the VM, whose ``nc``
connects to the endpoint that it was given. The tests share one host and go on from each other, in this order.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.console import typed
from support.object_store import client_of, eventually
from support.search import shown
from support.slots import vm_slots
from support.stack import Host, Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root]

NAME = "objects.service.kept.supercloud.internal"
SECRET = b"what-nobody-else-may-read-" * 4000
VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_CA_BUNDLE",
)  # fmt: skip
BODY = """\
buckets:
  - {{name: photos, quota: 16MiB}}
  - {{name: notes, quota: 4MiB, versioning: true}}
environments:
  - name: web
    kind: container
    image: oci:{examples}/web
    memory: 64MiB
    ports: [8080]
    buckets: [{{name: photos}}, {{name: notes, access: read}}]
  - name: other
    kind: container
    image: oci:{examples}/web
    memory: 64MiB
    ports: [8080]
"""
MACHINE = """\
  - name: machine
    kind: vm
    image: {examples}/vm
    memory: 128MiB
    ports: [8080, 9000]
    buckets: [{{name: photos}}]
"""


class Kept:
    """The stack, its one host, and the U-Cloud ``kept``."""

    def __init__(self, made: Stack, examples: Path, place: Path) -> None:
        self.stack, self.examples, self.place = made, examples, place
        self.host: Host = made.hosts["here"]
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        threading.Thread(target=self._tunnel, daemon=True).start()

    def up(self, more: str = "") -> str:
        manifest = self.stack.manifest("kept", (BODY + more).format(examples=self.examples))
        return self.stack.cli("up", manifest).stdout

    def sh(self, script: str, name: str = "web", status: int | None = 0) -> str:
        done = self.stack.cli("exec", f"kept/{name}", "--", "sh", "-c", script, status=status)
        return done.stdout

    def buckets(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.stack.json("buckets")}

    def variables(self) -> dict[str, str]:
        lines = self.sh("; ".join(f"echo ${name}" for name in VARIABLES)).splitlines()
        return dict(zip(VARIABLES, lines, strict=True))

    def client(self) -> Any:
        """An S3 client with what the container has, through the container."""
        given = self.variables()
        authority = self.sh(f"cat {given['AWS_CA_BUNDLE']}")
        return self.client_with(given, authority, self._listener.getsockname()[1])

    def client_with(self, given: dict[str, str], authority_pem: str, port: int) -> Any:
        """One with variables as an EE has them, by a port of ours that leads to the endpoint."""
        assert given["AWS_ENDPOINT_URL"] == f"https://{NAME}:9000"
        authority = self.place / "ca.pem"
        authority.write_text(authority_pem)
        secret = {
            "access_key": given["AWS_ACCESS_KEY_ID"],
            "secret_key": given["AWS_SECRET_ACCESS_KEY"],
            "region": given["AWS_REGION"],
        }
        return client_of(f"https://{NAME}:{port}", secret, str(authority))

    def typed(self, line: str, until: str) -> str:
        return typed(self.stack, "kept/machine", line, until).replace("\r", "")

    def _tunnel(self) -> None:
        """Each connection is the standard input and output of an ``nc`` in the container."""
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock:
                    self.stack.popen(
                        "exec", "-i", "kept/web", "--", "nc", NAME, "9000",
                        stdin=sock.fileno(), stdout=sock.fileno(),
                    )  # fmt: skip

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def kept(
    product_images: Path, example_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    with vm_slots(), stack(product_images) as made, pytest.MonkeyPatch.context() as patch:
        resolve = socket.getaddrinfo

        def here(host: Any, *more: Any, **options: Any) -> Any:
            return resolve("127.0.0.1" if host == NAME else host, *more, **options)

        patch.setattr(socket, "getaddrinfo", here)
        made.enrol("kept", "here")
        shaped = Kept(made, example_images, tmp_path_factory.mktemp("kept"))
        shaped.up()
        yield shaped
        shaped.close()


def test_a_container_puts_and_gets_an_object(kept: Kept) -> None:
    s3 = kept.client()
    s3.put_object(Bucket="photos", Key="holiday/first", Body=SECRET)
    assert s3.get_object(Bucket="photos", Key="holiday/first")["Body"].read() == SECRET
    listed = s3.list_objects_v2(Bucket="photos")["Contents"]
    assert [item["Key"] for item in listed] == ["holiday/first"]
    wait_for(lambda: kept.buckets()["photos"]["entries"] > 0, 30)
    row = kept.buckets()["photos"]
    assert row["used_bytes"] >= len(SECRET)
    assert row["used_by"] == {"web": "write"}
    assert "photos" in kept.stack.cli("buckets").stdout


def test_a_machine_puts_and_gets_what_containers_do(kept: Kept) -> None:
    kept.client().put_object(Bucket="photos", Key="of-web", Body=b"a container's")
    kept.up(MACHINE)
    lines = kept.typed("cat /etc/supercloud-objects.env", r"AWS_ENDPOINT_URL.*AWS_CA_BUNDLE=\S+\s")
    given = dict(line.split("=", 1) for line in lines.splitlines())
    assert given.keys() == set(VARIABLES)
    assert given["AWS_SECRET_ACCESS_KEY"] != kept.variables()["AWS_SECRET_ACCESS_KEY"]
    authority = kept.typed(f"cat {given['AWS_CA_BUNDLE']}", "-----BEGIN.*END CERTIFICATE-----")
    # the client's bytes go through the machine, which resolves the endpoint's name and connects to it
    kept.typed(f"nc -ll -p 9000 -e nc {NAME} 9000 & echo listening$?", "listening0")
    (row,) = [row for row in kept.stack.json("ps") if row["name"] == "machine"]
    port = int(row["urls"][1].rpartition(":")[2].rstrip("/"))
    s3 = kept.client_with(given, authority + "\n", port)
    s3.put_object(Bucket="photos", Key="of-machine", Body=SECRET)
    assert s3.get_object(Bucket="photos", Key="of-machine")["Body"].read() == SECRET
    assert s3.get_object(Bucket="photos", Key="of-web")["Body"].read() == b"a container's"
    assert kept.client().get_object(Bucket="photos", Key="of-machine")["Body"].read() == SECRET


def test_it_may_do_what_the_manifest_says_and_no_more(kept: Kept) -> None:
    from botocore.exceptions import ClientError

    s3 = kept.client()
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.put_object(Bucket="notes", Key="a", Body=b"b")
    with pytest.raises(ClientError, match="QuotaExceeded"):
        s3.put_object(Bucket="photos", Key="huge", Body=bytes(17 << 20))


def test_who_uses_no_bucket_does_not_reach_the_store(kept: Kept) -> None:
    assert "AWS_" not in kept.sh("set", "other")
    gateway = kept.sh("ip route", "other").split()[2]
    knock = "nc -w 3 {} {} </dev/null && echo through || echo refused"
    assert kept.sh(knock.format(gateway, 9000), "other").strip() == "refused"
    for address in ("169.254.77.1", gateway):  # nor does the one who may, by another way
        assert kept.sh(knock.format(address, 7445)).strip() == "refused"
    assert kept.sh(knock.format("169.254.77.1", 7444)).strip() == "refused"
    wait_for(lambda: kept.sh(knock.format(gateway, 9000)).strip() == "through", 60)


def test_secrets_are_in_the_containers_environment_only(kept: Kept) -> None:
    secret = kept.variables()["AWS_SECRET_ACCESS_KEY"]
    said = [
        kept.stack.cli("inspect", "kept/web", "--json").stdout,
        kept.stack.cli("inspect", "kept", "--json").stdout,
        kept.stack.cli("buckets", "inspect", "kept/photos", "--json").stdout,
        kept.stack.cli("events").stdout,
        kept.up(),
    ]
    assert not any(secret in text for text in said)
    files = [p for p in kept.stack.directory.rglob("*") if p.is_file() and not p.is_symlink()]
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
            if path.stat().st_size < 64 << 20:
                assert secret.encode() not in path.read_bytes(), path


def test_the_providers_disk_has_neither_content_nor_names(kept: Kept) -> None:
    place = kept.host.state / "domains" / "objects:kept"
    assert any(path.is_file() for path in place.rglob("*"))
    assert shown(place, [SECRET[:40], b"holiday", b"photos"]) == {}
    assert shown(kept.host.directory, [SECRET[:40], b"holiday/first"]) == {}


def test_services_say_what_runs(kept: Kept) -> None:
    rows = {row["kind"]: row for row in kept.stack.json("services")}
    assert rows["objects"]["state"] == "running"
    assert rows["objects"]["memory_bytes"] > 0
    assert rows["block"]["state"] == "not running"
    assert "objects" in kept.stack.cli("services").stdout


def test_what_was_acknowledged_outlives_the_death_of_the_service(kept: Kept) -> None:
    s3 = kept.client()
    s3.put_object(Bucket="photos", Key="last", Body=b"acknowledged")
    os.kill(kept.host.pid_of("objects:kept"), signal.SIGKILL)
    answer = eventually(lambda: s3.get_object(Bucket="photos", Key="last"))
    assert answer["Body"].read() == b"acknowledged"


def test_the_store_goes_on_while_the_users_domain_is_restarted(kept: Kept) -> None:
    kept.client().put_object(Bucket="photos", Key="before", Body=b"1")
    store = kept.host.pid_of("objects:kept")
    os.kill(kept.host.pid_of("user:kept"), signal.SIGKILL)
    read = eventually(lambda: kept.client().get_object(Bucket="photos", Key="before"))
    assert read["Body"].read() == b"1"
    assert kept.host.pid_of("objects:kept") == store
    wait_for(lambda: kept.buckets()["photos"]["state"] == "ready", 60)


def test_down_keeps_the_objects_and_up_finds_them(kept: Kept) -> None:
    kept.client().put_object(Bucket="photos", Key="holiday/second", Body=b"2")
    before = kept.variables()
    said = kept.stack.cli("down", "kept").stdout
    assert "photos" in said
    assert {row["state"] for row in kept.buckets().values()} == {"kept"}
    kept.up()
    assert kept.variables() == before
    s3 = kept.client()
    assert s3.get_object(Bucket="photos", Key="holiday/first")["Body"].read() == SECRET


def test_a_bucket_is_deleted_with_all_that_is_in_it_and_the_others_stay(kept: Kept) -> None:
    kept.stack.cli("down", "kept")
    kept.stack.cli("buckets", "delete", "kept/photos")
    assert kept.buckets().keys() == {"notes"}
    kept.up()
    assert kept.client().list_objects_v2(Bucket="photos")["KeyCount"] == 0


def test_deleted_buckets_leave_nothing(kept: Kept) -> None:
    refused = kept.stack.cli("buckets", "delete", "kept/photos", status=None)
    assert refused.returncode
    assert "manifest" in refused.stderr
    kept.stack.cli("down", "kept", "--volumes")
    wait_for(lambda: not kept.buckets(), 60)
    assert not list((kept.host.state / "domains" / "objects:kept").iterdir())
    (user,) = kept.host.json("user", "list")
    assert user["used"]["disk_bytes"] == 0
