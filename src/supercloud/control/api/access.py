"""Who is asking: a process of this machine, or a certificate's holder; and what that allows."""

import grp
import os
import socket
import struct
from dataclasses import dataclass

from aiohttp import web

from supercloud.control.settings import Settings
from supercloud.model.errors import Denied
from supercloud.trust.names import CONTROL, Identity
from supercloud.trust.tls import identity_in

_UCRED = struct.Struct("3i")
_SO_PEERGROUPS = 59
_MAX_GROUPS = 65536
_CERTIFICATE = f"show one of the role {CONTROL} under the U-Cloud's root, or use the unix socket"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``scope`` is the one U-Cloud that they may touch; "" is all."""

    name: str
    scope: str = ""

    def may(self, ucloud: str) -> None:
        """Denied unless ``ucloud`` is theirs."""
        if self.scope and self.scope != ucloud:
            raise Denied(
                f"{self.name} may use U-Cloud {self.scope} only, not {ucloud}",
                hint=f"use a certificate of {ucloud}",
            )


class Access:
    """Decides by the transport of a request."""

    def __init__(self, settings: Settings) -> None:
        """The uids and the group are the settings'. Raises KeyError for an unknown group."""
        self._uids = settings.allowed_uids
        self._gid = grp.getgrnam(settings.socket_group).gr_gid if settings.socket_group else None

    def caller(self, request: web.Request) -> Caller:
        """Who asks. Denied when they may not."""
        transport = request.transport
        if transport is None:
            raise Denied("the connection is gone")
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            return self._process(sock)
        return _holder(transport.get_extra_info("peercert"))

    def _process(self, sock: socket.socket) -> Caller:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, gid = _UCRED.unpack(credentials)
        if uid in self._uids or (self._gid is not None and self._gid in _groups(sock, gid)):
            return Caller(f"uid/{uid}")
        raise Denied(
            f"uid {uid} may not use the control plane of uid {os.getuid()}",
            hint="set SUPERCLOUD_SOCKET to your own, or have this one started with --socket-group",
        )


def _groups(sock: socket.socket, gid: int) -> set[int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    return {gid, *struct.unpack(f"{len(raw) // 4}I", raw)}


def _holder(certificate: object) -> Caller:
    if not certificate:
        raise Denied("a client certificate is needed", hint=_CERTIFICATE)
    identity: Identity = identity_in(certificate)
    if identity.role != CONTROL:
        raise Denied(
            f"{identity} has the role {identity.role}, needed is {CONTROL}", hint=_CERTIFICATE
        )
    return Caller(str(identity), identity.ucloud)
