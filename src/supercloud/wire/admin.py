"""The admin socket of a host: one JSON message each way, after its length (u32, big endian).

A request is ``{"m": method, "p": {...}}``, an answer ``{"r": result}`` or ``{"e": error}``. The
methods are declared here, with the names of the parameters that each takes.
"""

import json
import os
import socket
import struct
from typing import Any

from supercloud.model.errors import Invalid, Temporary, from_wire

HEADER = struct.Struct(">I")
MAX_BYTES = 1 << 20
RUN = "/run/supercloud-host"

METHODS: dict[str, tuple[str, ...]] = {
    "status": (),
    "user.add": ("user", "ca_pem", "quota"),
    "user.remove": ("user",),
    "user.list": (),
    "user.quota": ("user", "quota"),
    "host.domains": (),
    "drivers": (),
}


def socket_path(instance: str) -> str:
    """Where an instance's admin socket is."""
    return f"{RUN}/{instance}/admin.sock"


def pack(message: dict[str, Any]) -> bytes:
    """The frame of a message; Invalid when it is too large."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_BYTES:
        raise Invalid(f"a message of {len(data)} bytes; at most {MAX_BYTES}")
    return HEADER.pack(len(data)) + data


def unpack(untrusted: bytes) -> tuple[dict[str, Any], int] | None:
    """The first message and how many bytes it took; None when it is not complete. Invalid."""
    if len(untrusted) < HEADER.size:
        return None
    length = HEADER.unpack_from(untrusted)[0]
    if length > MAX_BYTES:
        raise Invalid(f"a message of {length} bytes; at most {MAX_BYTES}")
    end = HEADER.size + length
    if len(untrusted) < end:
        return None
    try:
        message = json.loads(untrusted[HEADER.size : end])
    except (ValueError, RecursionError) as error:
        raise Invalid("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise Invalid("a message that is not an object")
    return message, end


def call(
    instance: str, method: str, parameters: dict[str, Any] | None = None, *, timeout_s: float = 60.0
) -> Any:
    """Ask the admin console of a host. Its error, or Temporary when nobody answers."""
    path = socket_path(instance)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout_s)
            sock.connect(path)
            sock.sendall(pack({"m": method, "p": parameters or {}}))
            answer = _answer(sock)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise Temporary(f"host {instance} does not answer on {path}: {why}") from error
    if "e" in answer:
        raise from_wire(answer["e"])
    return answer.get("r")


def _answer(sock: socket.socket) -> dict[str, Any]:
    data = b""
    while (complete := unpack(data)) is None:
        more = sock.recv(1 << 16)
        if not more:
            raise ConnectionResetError
        data += more
    return complete[0]
