"""What is wrong with the volumes of a manifest, and of its environments."""

import posixpath
from collections.abc import Mapping, Sequence

from supercloud.control.manifest.problems import Problems
from supercloud.model.resources import Environment, Volume, VolumeUse
from supercloud.model.sizes import format_size
from supercloud.wire.volumes import LIMITS, SIZE_UNIT_BYTES

SERIAL_MAX = 20
"""Characters of a virtio disk's serial, by which a virtual machine knows its volumes."""

_KERNELS = ("/proc", "/sys", "/dev")


def check(environments: Sequence[tuple[int, Environment]], problems: Problems) -> None:
    """Note every problem; each environment comes with its place in the manifest."""
    for index, environment in environments:
        path = f"environments[{index}]"
        if environment.volumes and environment.replicas > 1:
            message = (
                f"found {environment.replicas}, allowed is at most 1 with volumes: "
                "a volume has one user, and replicas would be several"
            )
            hint = "write an environment for each, with a volume of its own"
            problems.at_path(f"{path}.replicas", message, hint=hint)
        _paths(path, environment, problems)
    _users(environments, problems)


def check_volume(path: str, volume: Volume, problems: Problems) -> None:
    """Note what its host would refuse."""
    if volume.size_bytes % SIZE_UNIT_BYTES:
        message = f"found {volume.size_bytes}, allowed is a multiple of {SIZE_UNIT_BYTES} bytes"
        problems.at_path(f"{path}.size", message)
    for field, key in (("iops", "iops"), ("bytes_per_s", "bandwidth")):
        found, (least, most) = getattr(volume, field), LIMITS[field]
        if found and not least <= found <= most:
            message = f"found {found}, allowed is 0 (no limit), or {least} to {most}"
            problems.at_path(f"{path}.{key}", message)


def check_copies(
    volumes: Sequence[tuple[int, Volume]],
    environments: Sequence[tuple[int, Environment]],
    problems: Problems,
) -> None:
    """Note what cannot be a copy, or cannot be copied."""
    by_name = {volume.name: volume for _, volume in volumes}
    used = {use.name: item.name for _, item in environments for use in item.volumes}
    for index, volume in volumes:
        path, source = f"volumes[{index}]", by_name.get(volume.copy_of)
        if not volume.copy_of:
            continue
        if volume.clone and volume.backup:
            problems.at_path(f"{path}.backup", "found beside clone, allowed is one of them")
        if volume.copy_of == volume.name:
            problems.at_path(path, f"found {volume.name!r} as a copy of itself")
        if volume.replicas > 1 or (source is not None and source.replicas > 1):
            message = "is not for volumes that are kept on several hosts"
            problems.at_path(f"{path}.{'clone' if volume.clone else 'backup'}", message)
        if volume.backup:
            _backup(f"{path}.backup", volume, source, used, problems)


def _backup(
    path: str, volume: Volume, source: Volume | None, used: Mapping[str, str], problems: Problems
) -> None:
    if source is None:
        message = f"found {volume.copy_of!r}, allowed is a volume of this manifest"
        problems.at_path(f"{path}.of", message)
    elif source.size_bytes != volume.size_bytes:
        found, wanted = format_size(volume.size_bytes), format_size(source.size_bytes)
        problems.at_path(
            path, f"found a size of {found}, allowed is {wanted}, which {source.name} has"
        )
    if volume.name in used:
        message = f"found {volume.name!r}, which environment {used[volume.name]!r} uses"
        hint = "let it use a volume that is a clone of a snapshot of this one"
        problems.at_path(path, message, hint=hint)


def _paths(path: str, environment: Environment, problems: Problems) -> None:
    seen: set[str] = set()
    for number, use in enumerate(environment.volumes):
        below = f"{path}.volumes[{number}]"
        if environment.kind == "vm":
            _disk(below, use, problems)
            continue
        if wrong := _wrong(use.path):
            problems.at_path(f"{below}.path", wrong)
        elif use.path in seen:
            problems.at_path(f"{below}.path", f"found {use.path!r:.200} twice")
        seen.add(use.path)


def _disk(below: str, use: VolumeUse, problems: Problems) -> None:
    if use.path:
        message = "is for containers only: a virtual machine has the volume as a disk"
        hint = f"remove it; the disk's serial is {use.name}"
        problems.at_path(f"{below}.path", message, hint=hint)
    if len(use.name) > SERIAL_MAX:
        message = (
            f"found {use.name!r}, allowed is a name of at most {SERIAL_MAX} characters: a virtual "
            "machine knows its disk by it, as its serial"
        )
        problems.at_path(f"{below}.name", message)


def _wrong(path: str) -> str:
    """Why nothing can be mounted at ``path``; "" when it can."""
    if not path:
        return "is required and missing: where the container has the volume's file system"
    if not path.startswith("/") or not path.isprintable():
        return f"found {path!r:.200}, allowed is an absolute path such as /var/lib/data"
    if posixpath.normpath(path) != path or path.startswith("//") or path == "/":
        return f"found {path!r:.200}, allowed is a path below / without '.', '..' and extra '/'"
    if any(path == kernels or path.startswith(kernels + "/") for kernels in _KERNELS):
        return f"found {path!r:.200}, which is the kernel's"
    return ""


def _users(environments: Sequence[tuple[int, Environment]], problems: Problems) -> None:
    """One user a volume; several when all of them only read."""
    first: dict[str, tuple[str, str, bool]] = {}
    for index, environment in environments:
        for number, use in enumerate(environment.volumes):
            where = f"environments[{index}].volumes[{number}].name"
            mine = (environment.name, where, use.read_only)
            user, place, reads = first.setdefault(use.name, mine)
            if place == where:
                continue
            if user == environment.name:
                problems.at_path(where, f"found the volume {use.name!r} twice")
            elif not (reads and use.read_only):
                message = f"found the volume {use.name!r}, which {user!r} uses already"
                hint = "give each its own, or say read_only: true in all of them"
                problems.at_path(where, message, hint=hint)
