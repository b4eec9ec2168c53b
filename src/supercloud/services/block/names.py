"""What a daemon's nodes, sockets and jobs are called, and the documents that describe them."""

import secrets
from typing import Any, Final

WIRE: Final = "wire"
DEVICE: Final = "device"
VOLUME: Final = "volume"
LIMITED: Final = "limited"
TARGET: Final = "target"
GROUP: Final = "limits"
COPY: Final = "copy"
CLUSTER_BYTES: Final = 64 << 10
CACHE_BYTES: Final = 8 << 20  # of tables, at most: enough for 64 GiB in use at a time


def wire(descriptor: int, export: str) -> dict[str, Any]:
    """The way to the protected device, a connected NBD socket that the daemon inherits."""
    server = {"type": "fd", "str": str(descriptor)}
    return {"driver": "nbd", "node-name": WIRE, "server": server} | _export(export)


def device(size_bytes: int) -> dict[str, Any]:
    """The protected device: as much of what its way announces as there is now."""
    node: dict[str, Any] = {"driver": "raw", "node-name": DEVICE, "file": WIRE}
    return node | {"size": size_bytes, "discard": "unmap"}


def target(address: str, export: str) -> dict[str, Any]:
    """Another volume, over NBD."""
    return {"driver": "nbd", "node-name": TARGET, "server": unix(address)} | _export(export)


def _export(name: str) -> dict[str, Any]:
    return {"export": name, "discard": "unmap"}


def volume(image_format: str) -> dict[str, Any]:
    """The image on the device."""
    node: dict[str, Any] = {
        "driver": image_format,
        "node-name": VOLUME,
        "file": DEVICE,
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }
    return node | ({"cache-size": CACHE_BYTES} if image_format == "qcow2" else {})


def limited() -> dict[str, Any]:
    """What is exported: the volume, as fast as its limits allow."""
    return {
        "driver": "throttle",
        "node-name": LIMITED,
        "file": VOLUME,
        "throttle-group": GROUP,
        "discard": "unmap",
    }


def fresh_address() -> str:
    """A new name in the abstract namespace, which is the network namespace's own."""
    return f"supercloud-{secrets.token_hex(16)}"


def unix(address: str) -> dict[str, Any]:
    """The socket address of that name."""
    return {"type": "unix", "path": address, "abstract": True}


def image_options(address: str, image_format: str) -> str:
    """What ``qemu-img --image-opts`` takes for an image on an exported device."""
    server = f"server.type=unix,file.server.path={address},file.server.abstract=on"
    return f"driver={image_format},file.driver=nbd,file.{server},file.export={DEVICE}"


def image_on(descriptor: int, export: str) -> str:
    """What ``qemu-img --image-opts`` takes for a qcow2 image on a connected device."""
    server = f"server.type=fd,file.server.str={descriptor}"
    return f"driver=qcow2,file.driver=nbd,file.{server},file.export={export}"


def raw_options(address: str, export: str) -> str:
    """What ``qemu-img --image-opts`` takes for an exported volume."""
    server = f"server.type=unix,server.path={address},server.abstract=on"
    return f"driver=nbd,{server},export={export}"
