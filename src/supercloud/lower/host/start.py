"""From the command line to the keeper: check everything, prepare, execute."""

import argparse
import fcntl
import ipaddress
import json
import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from supercloud.isolation.kinds import Site, uplink_lease
from supercloud.lower.host import grants, images, registry
from supercloud.lower.vmm.probe import Accelerator, probe
from supercloud.model.errors import STATUS, Busy, Denied, Invalid, UserError
from supercloud.wire import admin
from supercloud.wire.codec import encode

_INSTANCE: Final = re.compile(r"[a-z][a-z0-9-]{0,23}")
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_BACKLOG: Final = 512
_KEEPER: Final = os.path.normpath(f"{os.path.dirname(__file__)}/../core/keeper.py")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    instance: str
    state: str
    listen: tuple[str, int]
    images: str
    region: str
    jurisdiction: str
    publish: str
    templates: str
    dial: str
    ports: tuple[int, int] | None
    ready: int


def main(arguments: list[str]) -> int:
    """Start a host; returns only when that failed."""
    try:
        start(_options(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"  what to do: {error.hint}", file=sys.stderr)
        return STATUS[error.code][1]


def start(options: Options) -> NoReturn:
    """Prepare everything and become the keeper."""
    if os.geteuid() != 0:
        raise Denied("a host is started by root", hint="sudo supercloud-host run ...")
    os.umask(0o022)
    os.makedirs(options.state, mode=0o755, exist_ok=True)
    locks = [_lock(options.state, options.instance)]
    run = f"{admin.RUN}/{options.instance}"
    os.makedirs(run, mode=0o755, exist_ok=True)
    locks.append(_lock(run, options.instance))
    share = registry.claim(options.instance, options.state)
    adopted = images.adopt(options.images, options.state)
    inherited = {
        "listener": _listen(options.listen),
        "admin": _admin_socket(admin.socket_path(options.instance)),
        "ready": options.ready,
        "kernel": images.sealed(adopted.kernel, "kernel"),
        "initrd": images.sealed(adopted.initrd, "initrd"),
        "root": os.open(adopted.root, os.O_RDONLY | os.O_CLOEXEC),
    }
    runtime = adopted.runtime, adopted.runtime_sha256
    accelerator = probe(*runtime, inherited["kernel"], share.last_uid, share.last_owner)
    site = _site(options, share, adopted, accelerator)
    manifest = grants.compile_manifest(options.instance, share, adopted, site, options.state)
    path = f"{options.state}/grant-manifest.json"
    grants.write(manifest, path)
    _note_pid(run)
    _become_keeper(path, run, options.state, inherited, locks)


def _options(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="supercloud-host run")
    parser.add_argument("--instance", default="default", help="its name, where there are several")
    parser.add_argument("--state", default="", help="default: /var/lib/supercloud-host/INSTANCE")
    parser.add_argument("--listen", default="127.0.0.1:7443", help="for control planes")
    parser.add_argument("--images", required=True, help="directory that the image builder filled")
    parser.add_argument("--region", default="local", help="as manifests name it")
    parser.add_argument("--jurisdiction", default="local", help="likewise")
    parser.add_argument("--publish", default="127.0.0.1", help="address of published ports")
    parser.add_argument(
        "--templates", choices=("auto", "asked", "none"), default="auto",
        help="what platforms start from: made by itself, when users ask for it, or they boot",
    )  # fmt: skip
    parser.add_argument(
        "--dial", choices=("elsewhere", "any", "none"), default="elsewhere",
        help="where users' domains may connect to; any: also to other hosts on this machine",
    )  # fmt: skip
    parser.add_argument("--ports", default="", help="published ports: FIRST-LAST")
    parser.add_argument("--ready-fd", type=int, default=1, help="told when it is ready")
    given = parser.parse_args(arguments)
    _match(_INSTANCE, given.instance, "instance")
    for name in ("region", "jurisdiction"):
        _match(_LABEL, getattr(given, name), name)
    return Options(
        given.instance,
        os.path.abspath(given.state or f"/var/lib/supercloud-host/{given.instance}"),
        _address(given.listen),
        os.path.abspath(given.images),
        given.region,
        given.jurisdiction,
        _ip(given.publish, "publish"),
        given.templates,
        given.dial,
        _range(given.ports) if given.ports else None,
        given.ready_fd,
    )


def _match(pattern: re.Pattern[str], text: str, where: str) -> None:
    if not pattern.fullmatch(text):
        raise Invalid(f"{text!r:.80} is no name (a-z, 0-9, -)", where=f"--{where}")


def _ip(text: str, where: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError as error:
        raise Invalid(f"{text!r:.80} is not an IPv4 address", where=f"--{where}") from error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise Invalid(f"{text!r:.80} is not ADDRESS:PORT", where="--listen")
    return _ip(host, "listen"), int(port)


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1024 <= int(first) <= int(last) < 65536):
        raise Invalid(f"{text!r:.80} is not FIRST-LAST within 1024-65535", where="--ports")
    return int(first), int(last)


def _lock(directory: str, instance: str) -> int:
    """Held as long as the keeper lives, for it inherits the descriptor."""
    descriptor = os.open(f"{directory}/host.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(
            f"a host runs on {directory} already",
            hint=f"stop it (supercloud-host stop --instance {instance}) or name another instance",
        ) from error
    return descriptor


def _listen(address: tuple[str, int]) -> int:
    try:
        return socket.create_server(address, backlog=_BACKLOG).detach()
    except OSError as error:
        raise Busy(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror}",
            hint="another program has that port; give another by --listen",
        ) from error


def _admin_socket(path: str) -> int:
    """Only root of the host may connect: the socket's mode says so."""
    if os.path.exists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    sock.listen(16)
    return sock.detach()


def _site(
    options: Options, share: registry.Share, adopted: images.Images, accelerator: Accelerator
) -> Site:
    first, last = options.ports or share.ports
    facts = {
        "instance": options.instance,
        "region": options.region,
        "jurisdiction": options.jurisdiction,
        "listen": f"{options.listen[0]}:{options.listen[1]}",
        "accelerator": accelerator.name,
        "accelerator_reason": accelerator.reason,
        "kernel": os.uname().release,
        "runtime_sha256": adopted.runtime_sha256,
        "images": [adopted.digest],
        "templates": options.templates,
        "cpus": len(os.sched_getaffinity(0)),
    }
    dns_server = _dns_server()
    uplink = {
        "address": options.publish,
        "first_port": first,
        "last_port": last,
        "dial": options.dial,
        "guest": encode(uplink_lease(resolves=bool(dns_server))),
    }
    return Site(
        json.dumps(facts), json.dumps(uplink), options.publish, dns_server, accelerator.name
    )


def _dns_server() -> str:
    """The first IPv4 name server of the machine, for guests to be forwarded to."""
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            words = [line.split()[:2] for line in file if line.startswith("nameserver")]
    except FileNotFoundError:
        return ""
    for word in words:
        try:
            return str(ipaddress.IPv4Address(word[1]))
        except (ValueError, IndexError):
            continue
    return ""


def _note_pid(run: str) -> None:
    """Who to signal, and when it started, so that a later process of that id is left alone."""
    with open("/proc/self/stat", encoding="ascii") as file:
        started = file.read().rpartition(")")[2].split()[19]
    with open(f"{run}/host.pid", "w", encoding="ascii") as file:
        file.write(f"{os.getpid()} {started}\n")


def _become_keeper(
    manifest: str, run: str, state: str, inherited: dict[str, int], locks: list[int]
) -> NoReturn:
    argv: list[Any] = [sys.executable, "-I", "-S", "-B", _KEEPER, "--manifest", manifest]
    argv += ["--run", run, "--state", state]
    for name, descriptor in inherited.items():
        argv += ["--fd", f"{name}={descriptor}"]
        os.set_inheritable(descriptor, True)
    for lock in locks:
        os.set_inheritable(lock, True)
    os.execv(sys.executable, argv)  # noqa: S606
