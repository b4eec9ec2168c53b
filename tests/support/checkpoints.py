"""An object store with the bucket of checkpoints on a really running host, and who uses it."""

import asyncio
import base64
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.checkpoints import BUCKET
from supercloud.wire.objects import STORE
from support.lower import ControlPlane

MIB = 1 << 20
KEY = base64.b64encode(bytes(range(32))).decode()


@dataclass
class Checkpointing:
    """What a control plane does about checkpoints of platforms."""

    plane: ControlPlane
    capacity_bytes: int = 1 << 30
    secret: str = field(default_factory=lambda: secrets.token_hex(32))
    store: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def prepare(self) -> None:
        """Have the store, the bucket and the credentials."""
        asked: dict[str, Any] = {
            "capacity_bytes": self.capacity_bytes,
            "key_base64": KEY,
            "buckets": [{"name": BUCKET, "quota_bytes": self.capacity_bytes}],
            "users": ["checkpoints"],
        }
        own = Identity(self.plane.user, SERVICE, STORE)
        deadline_s = time.monotonic() + 120
        while (status := await self.plane.call("objects.apply", asked))["state"] != "ready":
            if status["csr_pem"]:
                made = self.plane.authority.issue(status["csr_pem"], own)
                asked |= {"cert_pem": made.cert_pem, "chain_pem": made.chain_pem}
            assert time.monotonic() < deadline_s, status
            await asyncio.sleep(0.1)
        granted = {"name": "checkpoints", "buckets": {BUCKET: "write"}}
        given = await self.plane.call("objects.credentials", granted)
        self.store = {
            "secret": self.secret,
            "server_name": own.dns,
            "ca_pem": self.plane.ca_pem,
            **given,
        }

    async def take(self, name: str, **more: Any) -> dict[str, Any]:
        asked = {"name": name, "uid": name, "store": self.store, "head": self.heads.get(name)}
        taken = await self.plane.call("platform.checkpoint", {**asked, **more}, timeout_s=200)
        self.heads[name] = taken["head"]
        return dict(taken)

    def restore(self, name: str, sequence: int | None = None, **store: Any) -> dict[str, Any]:
        """``PlatformSpec.restore``."""
        head = self.heads[name]
        return {"ee": name, "store": {**self.store, **store}, "head": head, "sequence": sequence}
