"""The OCI runtime configuration of a container, made from its EE's spec (runtime-spec 1.1)."""

import json
import os
from collections.abc import Mapping
from typing import Any

from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent.users import User
from supercloud.upper.platform.agent.volumes import view
from supercloud.wire.messages import EnvironmentSpec
from supercloud.wire.places import OBJECTS_PORT

# Well below Docker's fourteen: no raw sockets, device nodes, chroot, file capabilities, audit.
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID",
    "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID",
)  # fmt: skip
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats", "/sys/firmware", "/sys/devices/virtual/powercap", "/sys/block",
    "/sys/kernel",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
MAX_PIDS = 4096
MAX_FILES = 65536
CPU_PERIOD_US = 100_000

_SECCOMP = os.path.join(os.path.dirname(__file__), "seccomp.json")


def _mount(target: str, kind: str, options: str, source: str = "") -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source or kind,
            "options": options.split(",")}  # fmt: skip


MOUNTS = (
    _mount("/proc", "proc", "nosuid,noexec,nodev"),
    _mount("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    _mount("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620"),
    _mount("/dev/shm", "tmpfs", "nosuid,noexec,nodev,mode=1777,size=65536k"),  # noqa: S108
    _mount("/dev/mqueue", "mqueue", "nosuid,noexec,nodev"),
    _mount("/sys", "sysfs", "nosuid,noexec,nodev,ro"),
    _mount("/sys/fs/cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
)
SYSCTLS = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 65535"}
FILES = ("resolv.conf", "hosts", "hostname")
CA_FILE = "supercloud-ca.pem"
"""In ``/etc``: the U-Cloud's root certificate, of an EE that uses its object store."""


def environment(*layers: Mapping[str, str], home: str) -> list[str]:
    """``NAME=value`` lines; later layers win. Invalid for what is no variable's name."""
    merged = {"PATH": PATH, "HOME": home}
    for layer in layers:
        merged |= layer
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name + value:
            raise Invalid(f"{name!r:.80} cannot be an environment variable")
    return [f"{name}={value}" for name, value in merged.items()]


def store_variables(spec: EnvironmentSpec) -> dict[str, str]:
    """By which S3 clients find the object store, and who they are there."""
    objects = spec.objects
    if objects is None:
        return {}
    return {
        "AWS_ENDPOINT_URL": f"https://{objects.server_name}:{OBJECTS_PORT}",
        "AWS_ACCESS_KEY_ID": objects.access_key,
        "AWS_SECRET_ACCESS_KEY": objects.secret_key,
        "AWS_REGION": objects.region,
        "AWS_CA_BUNDLE": f"/etc/{CA_FILE}",
    }


def process(
    argv: list[str], env: list[str], workdir: str, user: User, *, terminal: bool = False
) -> dict[str, Any]:
    """The ``process`` object, for the container's first process and for ``exec`` alike."""
    if not argv:
        raise Invalid("the image names no program and the environment has no command")
    if any("\0" in text for text in [*argv, workdir]):
        raise Invalid("a command with a zero byte")
    if workdir and not workdir.startswith("/"):
        raise Invalid(f"{workdir!r:.80} is no absolute path", where="workdir")
    return {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": argv, "env": env, "cwd": workdir or "/",
        "capabilities": {
            name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted")
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": MAX_FILES, "soft": MAX_FILES},
                    {"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
        "noNewPrivileges": True,
        "oomScoreAdj": 0,  # else it would have the agent's, which is the last to be ended
    }  # fmt: skip


def first_process(spec: EnvironmentSpec, user: User) -> dict[str, Any]:
    """What the EE runs: its own wishes over the image's."""
    image, own = spec.image.process, spec.process
    env = environment(image.env, store_variables(spec), own.env, home=user.home)
    return process(own.argv or image.argv, env, own.workdir or image.workdir, user)


def resources(spec: EnvironmentSpec) -> dict[str, Any]:
    """Limits for the EE's cgroup; no swap beyond memory."""
    return {
        "memory": {"limit": spec.memory_bytes, "swap": spec.memory_bytes},
        "cpu": {"quota": max(1000, int(spec.cpus * CPU_PERIOD_US)), "period": CPU_PERIOD_US},
        "pids": {"limit": MAX_PIDS},
        "devices": [{"allow": False, "access": "rwm"}],
    }


def volumes(spec: EnvironmentSpec, place: str) -> list[dict[str, Any]]:
    """The volumes as mounts, outer ones first; Invalid for a path that cannot be."""
    found = []
    for mount in sorted(spec.volumes, key=lambda mount: mount.path):
        parts = mount.path.split("/")[1:]
        plain = all(part not in ("", ".", "..") and "\0" not in part for part in parts)
        if not mount.path.startswith("/") or not plain or parts[0] in ("proc", "sys", "dev"):
            raise Invalid(f"volume {mount.volume} cannot be mounted at {mount.path!r:.80}",
                          hint="an absolute path, not / nor in /proc, /sys, /dev")  # fmt: skip
        options = "bind,rprivate,nosuid,nodev,noatime" + (",ro" if mount.read_only else "")
        found.append(_mount(mount.path, "bind", options, view(place, mount.volume)))
    if len({mount["destination"] for mount in found}) != len(found):
        raise Invalid(f"{spec.name} has two volumes at one path")
    return found


def config(
    spec: EnvironmentSpec, first: dict[str, Any], *, root: str, place: str, cgroup: str
) -> str:
    """``config.json``. The namespaces and the files to bind are in ``place``."""
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
    namespaces += [{"type": kind, "path": f"{place}/ns/{name}"}
                   for kind, name in (("user", "user"), ("network", "net"))]  # fmt: skip
    files = [*FILES, CA_FILE] if spec.objects else FILES
    binds = [_mount(f"/etc/{name}", "bind", "bind,ro,nosuid,nodev,noexec", f"{place}/{name}")
             for name in files]  # fmt: skip
    value = {
        "ociVersion": "1.0.2",
        "process": first,
        "root": {"path": root, "readonly": False},
        "hostname": spec.name,
        "mounts": [*MOUNTS, *volumes(spec, place), *binds],
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroup,
            "resources": resources(spec),
            "sysctl": SYSCTLS,
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
        },
    }  # fmt: skip
    text = json.dumps(value, separators=(",", ":")).removesuffix("}}")
    return f'{text},"seccomp":{seccomp_text()}}}}}'


def seccomp_text() -> str:
    """The default profile, as it is in the data file: no need to parse what only crun reads."""
    with open(_SECCOMP, encoding="ascii") as file:
        return file.read()
