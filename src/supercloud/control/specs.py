"""From documents to what a platform's agent is told."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec

from supercloud.control.documents import EnvironmentDocument, PlatformDocument, VolumeDocument
from supercloud.model.resources import Environment
from supercloud.wire.checkpoints import RestoreFrom
from supercloud.wire.messages import (
    Apply,
    EnvironmentSpec,
    ImageRef,
    Nic,
    ObjectAccess,
    PortMap,
    Process,
    VolumeMount,
)


def environment_spec(
    document: EnvironmentDocument, image: ImageRef, objects: ObjectAccess | None = None
) -> EnvironmentSpec:
    """The EE as its platform is to run it, without host ports and slots of volumes.

    The uid is a hash of everything that makes it what it is: another wish is another EE, and so is
    one that is restored. ``objects`` is without keys; it is for those that use buckets.
    """
    wish, place = document.spec, document.assignment
    spec = EnvironmentSpec(
        name=document.name,
        uid="e",
        kind=wish.kind,
        image=image,
        process=Process(argv=wish.command, env=wish.env),
        cpus=wish.cpus,
        memory_bytes=wish.memory_bytes,
        restart=wish.restart,
        ports=[PortMap(port=port.port, protocol=port.protocol) for port in wish.ports],
        nics=[
            Nic(
                network=place.network,
                address=f"{place.address}/{place.prefix_length}",
                gateway=place.gateway,
                mac=place.mac,
            )
        ],
        volumes=[
            VolumeMount(volume=use.name, path=use.path, read_only=use.read_only)
            for use in wish.volumes
        ],
        objects=objects if wish.buckets else None,
        checkpoints=wish.checkpoint is not None,
    )
    restored = [document.restore.number] if document.restore else []
    return replace(spec, uid="e" + _digest([document.ucloud, spec, *restored])[:20])


def apply_for(
    platform: PlatformDocument,
    environments: Sequence[EnvironmentDocument],
    generation: int,
    volumes: Sequence[VolumeDocument] = (),
    access: Mapping[str, ObjectAccess] | None = None,
    restores: Mapping[str, RestoreFrom | None] | None = None,
) -> Apply:
    """All that ``platform`` is to run, of all the EEs and with the volumes of its U-Cloud.

    ``access`` is what those EEs that use buckets are told of the object store, ``restores`` what
    those begin from that are to be restored: who is not in it is left out.
    """
    slots, restores = slots_of(platform, volumes), restores or {}
    here = [item for item in environments if runs_on(item, platform.name)]
    here = [item for item in here if not restoring(item) or item.name in restores]
    here = [item for item in here if not checkpoint_refusal(item.spec, platform.engines)]
    return Apply(
        generation=generation,
        environments=[_published(item, platform, slots, access or {}, restores) for item in here],
        names=names_for(platform.name, environments),
    )


def restoring(document: EnvironmentDocument) -> bool:
    """Whether it has yet to start from a checkpoint."""
    return document.restore is not None and document.restore.number > document.restored


def checkpoint_refusal(spec: Environment, engines: Mapping[str, str]) -> str:
    """Why a platform with ``engines`` cannot take checkpoints of it; "" if it need not, or can.

    Nothing is known of a platform that has not said yet what it has.
    """
    if spec.checkpoint is None or not engines:
        return ""
    return engines.get(f"checkpoint:{spec.kind}", "its platform does not say that it can")


def runs_on(document: EnvironmentDocument, platform: str) -> bool:
    """Whether ``platform`` is to run this EE now."""
    return document.ready is not None and document.ready_on == platform and not document.deleting


def shape_of(spec: EnvironmentSpec) -> str:
    """What a checkpoint of it is of: only the same can go on from one."""
    machine = [spec.cpus, spec.memory_bytes] if spec.kind == "vm" else []
    volumes = [replace(mount, slot=0) for mount in spec.volumes]
    return _digest([spec.kind, spec.image, spec.process, volumes, machine])


def platform_shape(platform: PlatformDocument) -> str:
    """Likewise, of a platform."""
    return _digest([platform.wish.size, platform.image or platform.wish.image])


def fingerprint(apply: Apply) -> str:
    """Equal for what is the same to an agent, whatever its generation."""
    return _digest(replace(apply, generation=0))


def slots_of(platform: PlatformDocument, volumes: Sequence[VolumeDocument]) -> dict[str, int]:
    """Where this incarnation of the platform has volumes."""
    here = (platform.name, platform.incarnation)
    return {item.name: item.slot for item in volumes if (item.platform, item.incarnation) == here}


def _published(
    document: EnvironmentDocument,
    platform: PlatformDocument,
    slots: Mapping[str, int],
    access: Mapping[str, ObjectAccess],
    restores: Mapping[str, RestoreFrom | None],
) -> EnvironmentSpec:
    spec = document.ready
    if spec is None:
        raise ValueError(f"{document.name} is not ready")
    ports = [
        replace(item, host_port=host_port(document, platform, item.port, item.protocol))
        for item in spec.ports
    ]
    mounts = [replace(mount, slot=slots.get(mount.volume, 0)) for mount in spec.volumes]
    objects = access.get(spec.name, spec.objects) if spec.objects else None
    begin = restores.get(spec.name) if document.current and restoring(document) else None
    return replace(spec, ports=ports, volumes=mounts, objects=objects, restore=begin)


def host_port(
    document: EnvironmentDocument, platform: PlatformDocument, port: int, protocol: str
) -> int:
    """The published port of an EE's port on its platform's address; 0 when there is none."""
    slot = document.assignment.slots.get(f"{port}/{protocol}", -1)
    return platform.first_port + slot if 0 <= slot < platform.ports else 0


def names_for(platform: str, environments: Iterable[EnvironmentDocument]) -> dict[str, list[str]]:
    """The DNS as ``platform`` sees it: EEs by name, and groups of replicas by theirs.

    A group has the addresses of its replicas on this platform, if there are any: nothing joins
    the networks of two platforms yet.
    """
    names: dict[str, list[str]] = {}
    groups: dict[str, list[EnvironmentDocument]] = {}
    for item in environments:
        if not item.deleting:
            names[item.name] = [item.assignment.address]
            groups.setdefault(item.spec.name, []).append(item)
    for group, members in groups.items():
        here = [item for item in members if item.assignment.platform == platform]
        names[group] = sorted(item.assignment.address for item in here or members)
    return dict(sorted(names.items()))


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
