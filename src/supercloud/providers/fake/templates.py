"""Pretended templates: made between one question and the next, lost with the process."""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from supercloud.model.errors import Invalid, NotFound
from supercloud.wire.content import blobs_of, digest_of, lay_out
from supercloud.wire.host import TemplateSpec, TemplateStatus
from supercloud.wire.messages import Blob

if TYPE_CHECKING:
    from supercloud.providers.fake.cloud import FakeCloud


class FakeTemplates:
    """Implements ``providers.base.Templates``; ``made`` by host and key."""

    def __init__(self, cloud: "FakeCloud") -> None:
        self._cloud = cloud
        self._blobs: set[str] = set()
        self.made: dict[tuple[str, str], TemplateStatus] = {}

    async def prepare(self, host: str, asked: TemplateSpec) -> TemplateStatus:
        """Begin to make one, or see how far it is."""
        await self._cloud.pretend("templates")
        lay_out(asked.environments)
        there = next((each for each in self._cloud.hosts() if each.name == host), None)
        if there is None or asked.image not in there.images:
            raise NotFound(f"{self._cloud.name} has no host {host} with the image {asked.image}")
        key = host, _key(asked)
        if (made := self.made.get(key)) is not None:
            self.made[key] = replace(made, state="ready")
            return self.made[key]
        if missing := sorted(blobs_of(asked.environments).keys() - self._blobs):
            return TemplateStatus(state="absent", missing=missing)
        self._cloud.hook("before", "template", host)
        digest = hashlib.sha256(key[1].encode()).hexdigest()
        status = TemplateStatus(
            state="making", booked_bytes=asked.memory_bytes, ram_sha256=digest, state_sha256=digest
        )
        self.made[key] = status
        self._cloud.hook("after", "template", host)
        return status

    async def offer(self, host: str, blob: Blob, content: AsyncIterator[bytes]) -> None:
        """Take a blob."""
        if host not in {each.name for each in self._cloud.hosts()}:
            raise NotFound(f"{self._cloud.name} has no host {host}")
        hasher = hashlib.sha256()
        async for data in content:
            hasher.update(data)
        if f"sha256:{hasher.hexdigest()}" != blob.digest:
            raise Invalid(f"what came as {blob.digest} is something else")
        self._blobs.add(blob.digest)


def _key(asked: TemplateSpec) -> str:
    shape = asked.image, asked.cpus, asked.memory_bytes, asked.scratch_bytes
    return f"{shape} {digest_of(asked.environments)}"
