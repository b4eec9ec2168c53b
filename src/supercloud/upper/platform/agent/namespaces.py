"""User and network namespaces that hold no process: files that an EE's engine joins.

Made ahead of the container, in one fork: the network namespace must belong to the user namespace
(else the container may not mount its sysfs), the user namespace is needed for the owner-shifted
view of the image, and both outlive restarts of the container and of the agent.
"""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from supercloud.upper.platform.agent import syscalls
from supercloud.upper.platform.agent.netlink import Netlink
from supercloud.upper.platform.agent.processes import fork

IDS_PER_ENVIRONMENT = 65536
KINDS = ("user", "net")

T = TypeVar("T")


def create(base_id: int, place: str) -> None:
    """Make ``place/user`` (0.. maps to ``base_id``..) and ``place/net``, unless they are there."""
    os.makedirs(place, mode=0o711, exist_ok=True)
    if all(_is_namespace(f"{place}/{kind}") for kind in KINDS):
        return
    remove(place)
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    child = fork(partial(_hold_namespaces, ready_write, go_read), (ready_write, go_read))
    try:
        os.close(ready_write)
        complaint = os.read(ready_read, 200)
        if complaint != b"ready":
            raise OSError(f"no user namespace: {complaint.decode('utf-8', 'replace')}")
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{kind}", "w") as file:
                file.write(f"0 {base_id} {IDS_PER_ENVIRONMENT}")
        for kind in KINDS:
            os.close(os.open(f"{place}/{kind}", os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
            syscalls.mount(f"/proc/{child}/ns/{kind}", f"{place}/{kind}", "", syscalls.MS_BIND)
    finally:
        for descriptor in (ready_read, go_read, go_write):
            os.close(descriptor)
        os.waitpid(child, 0)


def _hold_namespaces(ready_write: int, go_read: int) -> int:
    """The child: single-threaded after the fork, as a new user namespace demands."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNET)
        os.write(ready_write, b"ready")
        os.read(go_read, 1)
    except OSError as error:
        os.write(ready_write, str(error).encode()[:200])
    return 0


def remove(place: str) -> None:
    """Let go of both; they end with their last process."""
    for kind in KINDS:
        path = f"{place}/{kind}"
        if os.path.exists(path):
            syscalls.unmount(path)
            os.unlink(path)


def take_over(place: str, pid: int) -> None:
    """Those of a process become the ones at ``place``: it was made with its own."""
    remove(place)
    for kind in KINDS:
        os.close(os.open(f"{place}/{kind}", os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
        syscalls.mount(f"/proc/{pid}/ns/{kind}", f"{place}/{kind}", "", syscalls.MS_BIND)


def _is_namespace(path: str) -> bool:
    """A bind-mounted namespace is on another device than its directory."""
    try:
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False


def open_netlink(place: str) -> Netlink:
    """A netlink socket inside ``place/net``."""
    return _inside(place, Netlink)


def set_sysctls(place: str, values: Mapping[str, str]) -> None:
    """Set network parameters (``net.ipv4...``) of ``place/net``."""

    def write() -> None:
        for name, value in values.items():
            with open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
                file.write(value)

    _inside(place, write)


def _inside(place: str, work: Callable[[], T]) -> T:
    """Done in the network namespace; by a thread of its own, as setns moves the thread."""
    made: list[T] = []
    failed: list[OSError] = []

    def inside() -> None:
        try:
            descriptor = os.open(f"{place}/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.set_namespace(descriptor, syscalls.CLONE_NEWNET)
            finally:
                os.close(descriptor)
            made.append(work())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
