"""Where users' domains may dial, and how often."""

import pytest

from supercloud.lower.provider import dial
from supercloud.model.errors import Busy, Denied, Invalid


@pytest.mark.parametrize("address", ["198.51.100.7", "10.1.2.3", "2001:db8::7"])
def test_elsewhere_is_dialled(address: str) -> None:
    assert dial.check(address, "elsewhere") == address


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "169.254.169.254",
        "fd00:ec2::254", "168.63.129.16", "100.100.100.200",
        "fe80::1", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1",
    ],
)  # fmt: skip
def test_what_is_this_machines_own_or_nobodys_is_not(address: str) -> None:
    with pytest.raises(Denied):
        dial.check(address, "elsewhere")


def test_a_provider_may_allow_loopback_or_nothing() -> None:
    assert dial.check("127.0.0.1", "any") == "127.0.0.1"
    for address in ("169.254.169.254", "0.0.0.0", "224.0.0.1"):
        with pytest.raises(Denied):
            dial.check(address, "any")
    with pytest.raises(Denied):
        dial.check("198.51.100.7", "none")


@pytest.mark.parametrize(
    "address", ["", "localhost", "127.1", "1.2.3.4:80", "1.2.3.4/32", "::1%lo", "2001:db8::7%lo"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises((Invalid, Denied)):
        dial.check(address, "elsewhere")


def test_a_user_dials_so_often_and_no_more_and_others_are_not_touched() -> None:
    allowance = dial.Allowance()
    for _ in range(dial.BURST):
        allowance.take("a", 100.0)
    with pytest.raises(Busy):
        allowance.take("a", 100.0)
    allowance.take("b", 100.0)
    allowance.take("a", 100.0 + dial.EACH_S)
    with pytest.raises(Busy):
        allowance.take("a", 100.0 + dial.EACH_S)
