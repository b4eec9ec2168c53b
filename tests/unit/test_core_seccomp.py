"""The compiled filters say of every call what the data files say; run by an interpreter of BPF."""

import errno
import json
import struct

import pytest

from supercloud.isolation import seccomp
from supercloud.isolation.kinds import filters

KILL, ALLOW = 0x80000000, 0x7FFF0000
X86_64 = 0xC000003E


def run(program: bytes, number: int, *args: int, arch: int = X86_64) -> int:
    """The verdict of a program for one call."""
    args = (*args, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, arch, 0, *args)
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return value
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: accumulator & value,
            }[code]
            at += if_true if holds else if_false


@pytest.fixture(params=seccomp.names())
def name(request):
    return request.param


def test_every_call_gets_the_verdict_of_the_data(name):
    filter_, (program, _) = seccomp.load(name), seccomp.compiled(name)
    for call, number in seccomp.syscalls().items():
        if call in filter_.checks:
            continue
        expected = KILL
        if call in filter_.allow:
            expected = ALLOW
        if call in filter_.refuse:
            expected = 0x50000 | filter_.refuse[call]
        assert run(program, number) == expected, call


def test_calls_of_other_architectures_and_unknown_ones_are_fatal(name):
    program, _ = seccomp.compiled(name)
    assert run(program, 0, arch=0x40000003) == KILL
    assert run(program, 0x40000000) == KILL
    assert run(program, 0x40000001) == KILL
    for number in (335, 423, 470, 999, 0xFFFFFFFF):
        assert run(program, number) == KILL


@pytest.mark.parametrize(
    ("family", "allowed"), [(1, 1), (2, 1), (10, 1), (16, 0), (17, 0), (40, 0), (38, 0), (15, 0)]
)
def test_socket_families(family, allowed):
    program, _ = seccomp.compiled("base")
    number = seccomp.syscalls()["socket"]
    assert run(program, number, family) == (ALLOW if allowed else 0x50000 | errno.EAFNOSUPPORT)


def test_namespaces_cannot_be_cloned():
    program, _ = seccomp.compiled("vmm")
    number = seccomp.syscalls()["clone"]
    assert run(program, number, 0x01200011) == ALLOW  # fork
    assert run(program, number, 0x003D0F00) == ALLOW  # thread
    for flag in (
        0x20000,
        0x2000000,
        0x4000000,
        0x8000000,
        0x10000000,
        0x20000000,
        0x40000000,
        0x80,
    ):
        assert run(program, number, flag | 17) == 0x50000 | errno.EPERM


def test_terminals_are_not_fed_whatever_the_high_bits_say():
    program, _ = seccomp.compiled("base")
    number = seccomp.syscalls()["ioctl"]
    assert run(program, number, 0, 0x5401) == ALLOW
    for high in (0, 1 << 32, 1 << 63):
        assert run(program, number, 0, high | 0x5412) == 0x50000 | errno.EPERM


def test_sending_connects_nobody(name):
    """A closed socket that came from another network would be connected there (MSG_FASTOPEN)."""
    program, _ = seccomp.compiled(name)
    for call, place in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        number = seccomp.syscalls()[call]
        flags = [0] * 6
        for flags[place], verdict in (
            (0, ALLOW),
            (0x4000 | 0x40, ALLOW),  # MSG_NOSIGNAL | MSG_DONTWAIT
            (0x2000_0000, 0x50000 | errno.EPERM),
            (0x2000_4040, 0x50000 | errno.EPERM),
        ):
            assert run(program, number, *flags) == verdict, call


def test_a_users_domain_listens_on_nothing():
    program, _ = seccomp.compiled(filters()["user"])
    assert run(program, seccomp.syscalls()["listen"]) == 0x50000 | errno.EPERM


def test_an_extension_adds_and_overrides():
    base, vmm, passt = (seccomp.load(n) for n in ("base", "vmm", "passt"))
    assert base.allow < vmm.allow
    assert "mlock" in base.refuse
    assert "mlock" in vmm.allow - set(vmm.refuse)
    assert "unshare" in passt.allow
    assert "unshare" not in vmm.allow
    assert 16 in passt.checks["socket"].only


def test_every_group_has_a_reason(name):
    assert all(len(reason) > 10 for reason in seccomp.load(name).reasons.values())


def test_only_calls_that_exist_are_named(name):
    filter_ = seccomp.load(name)
    assert filter_.allow | set(filter_.refuse) | set(filter_.checks) <= set(seccomp.syscalls())
    assert not filter_.allow & set(filter_.refuse)


def test_the_filters_compile_to_what_was_reviewed():
    """After a change of a data file: ``python -m supercloud.isolation.seccomp``, and say why."""
    assert json.loads(seccomp.HASHES.read_text()) == {
        n: seccomp.compiled(n)[1] for n in seccomp.names()
    }
