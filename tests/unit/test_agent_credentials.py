"""What a VM is told that is secret: where it is, and where it is not."""

import base64
import os
from collections.abc import Iterator

import pytest

from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent import credentials
from supercloud.wire.messages import EnvironmentSpec, ImageRef, ObjectAccess

SECRET = "e2c9_very-secret"
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
NAME = "objects.service.demo.supercloud.internal"
PREFIX = "io.systemd.credential.binary:"


def machine(**changes: str) -> EnvironmentSpec:
    values = {"server_name": NAME, "ca_pem": PEM, "access_key": "SCABC", "secret_key": SECRET}
    objects = ObjectAccess(**{**values, "region": "here", **changes})
    image = ImageRef(format="raw", blobs={})
    return EnvironmentSpec(name="db", uid="e1", kind="vm", image=image, objects=objects)


@pytest.fixture
def given() -> Iterator[list[int]]:
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def strings(descriptors: list[int]) -> dict[str, str]:
    """What QEMU would read, by the credential's name."""
    found = {}
    for descriptor in descriptors:
        with open(f"/proc/self/fd/{descriptor}") as file:
            name, _, value = file.read().removeprefix(PREFIX).partition("=")
        found[name] = base64.b64decode(value, validate=True).decode()
    return found


def arguments(spec: EnvironmentSpec, given: list[int]) -> list[str]:
    return credentials.arguments(spec, lambda number: given.append(number) or number)


def test_a_guest_is_told_endpoint_keys_and_whom_to_trust(given: list[int]) -> None:
    arguments(machine(), given)
    found = strings(given)
    assert found["supercloud.objects"].splitlines() == [
        f"AWS_ENDPOINT_URL=https://{NAME}:9000",
        "AWS_ACCESS_KEY_ID=SCABC",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        "AWS_REGION=here",
        "AWS_CA_BUNDLE=/etc/supercloud-ca.pem",
    ]
    assert found["supercloud.ca"] == PEM


def test_systemd_makes_files_of_it(given: list[int]) -> None:
    arguments(machine(), given)
    found = strings(given)
    made = {}
    for line in found["tmpfiles.extra"].splitlines():
        kind, path, mode, user, group, age, content = line.split(" ")
        assert (kind, user, group, age) == ("f+~", "root", "root", "-")
        made[path] = (mode, base64.b64decode(content, validate=True).decode())
    assert made == {
        "/etc/supercloud-objects.env": ("0600", found["supercloud.objects"]),
        "/etc/supercloud-ca.pem": ("0644", PEM),
    }


def test_nothing_of_it_is_in_an_argument(given: list[int]) -> None:
    option, value = arguments(machine(), given)
    assert option == "-smbios"
    paths = "".join(f",path=/proc/self/fd/{number}" for number in given)
    assert value == f"type=11{paths}"


def test_what_is_handed_over_is_closed_to_other_programs_and_can_be_changed_by_nobody(
    given: list[int],
) -> None:
    arguments(machine(), given)
    for descriptor in given:
        assert not os.get_inheritable(descriptor)
        with pytest.raises(PermissionError):
            os.write(descriptor, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)


def test_who_uses_no_bucket_is_told_nothing(given: list[int]) -> None:
    image = ImageRef(format="raw", blobs={})
    assert arguments(EnvironmentSpec(name="db", uid="e1", kind="vm", image=image), given) == []
    assert given == []


@pytest.mark.parametrize("value", ["a\nLD_PRELOAD=x", "$(reboot)", "a b", "a'b", "a\0b"])
def test_a_key_that_would_be_more_than_a_value_is_refused(value: str, given: list[int]) -> None:
    with pytest.raises(Invalid, match="AWS_SECRET_ACCESS_KEY of db"):
        arguments(machine(secret_key=value), given)
    assert given == []
