"""What a template is given to prepare: environments without their secrets, and their blobs.

It lies on the disk ``scratch`` of the platform that becomes a template (a clone has another one): a
header of JSON, padded, and the blobs behind it, each at a multiple of ``ALIGNMENT_BYTES``, so that
it can be read past the kernel's cache. A blank disk is nothing to prepare.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Final

from supercloud.model.errors import Invalid
from supercloud.model.records import dataclass, field
from supercloud.wire.codec import Limit, Sha256, decode, encode
from supercloud.wire.messages import Blob, EnvironmentSpec, Process
from supercloud.wire.quota import Bytes

VERSION: Final = 1
HEADER_BYTES: Final = 1 << 20
ALIGNMENT_BYTES: Final = 4096
MAX_ENVIRONMENTS: Final = 16
MAX_CONTENT_BYTES: Final = 48 << 20
"""Of all blobs together: the user's domain holds them until the template is made."""

Environments = Annotated[list[EnvironmentSpec], Limit(max_length=MAX_ENVIRONMENTS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A blob, and where on the disk it is."""

    digest: Sha256
    size_bytes: Bytes
    offset_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What the disk holds."""

    version: Annotated[int, Limit(ge=VERSION, le=VERSION)] = VERSION
    environments: Environments = field(default_factory=list)
    blobs: list[Placed] = field(default_factory=list)


def can_be_prepared(spec: EnvironmentSpec) -> bool:
    """Containers up to their process; VMs that wait to be told who they are, without volumes.

    What is restored, or must be able to be checkpointed, starts in its own way. A VM that uses
    buckets too: its keys are in its firmware's tables from the start.
    """
    if spec.restore is not None or spec.checkpoints:
        return False
    alone = not spec.volumes and spec.objects is None
    return spec.kind == "container" or (spec.image.identity and alone)


def without_secrets(spec: EnvironmentSpec) -> EnvironmentSpec:
    """The same EE (its uid says so) without what comes once the platform is somebody's."""
    ports = [replace(port, host_port=0) for port in spec.ports]
    return replace(spec, process=Process(), objects=None, volumes=[], ports=ports)


def digest_of(environments: Sequence[EnvironmentSpec]) -> str:
    """Names what is prepared; "" for nothing. Their image's digests are in it."""
    if not environments:
        return ""
    text = json.dumps(encode(list(environments)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def blobs_of(environments: Iterable[EnvironmentSpec]) -> dict[str, Blob]:
    """Their blobs, by digest."""
    found = (blob for spec in environments for blob in spec.image.blobs.values())
    return {blob.digest: replace(blob, offset_bytes=0) for blob in found}


def lay_out(environments: Sequence[EnvironmentSpec]) -> Content:
    """Where everything is to be. Invalid: more than there is room for."""
    placed, offset, total = [], HEADER_BYTES, 0
    for blob in blobs_of(environments).values():
        size = blob.size_bytes
        placed.append(Placed(digest=blob.digest, size_bytes=size, offset_bytes=offset))
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        total += size
    if total > MAX_CONTENT_BYTES:
        raise Invalid(f"blobs of {total} bytes, at most {MAX_CONTENT_BYTES} can be prepared")
    return Content(environments=list(environments), blobs=placed)


def to_header(content: Content) -> bytes:
    """The disk's beginning. Invalid: too much to say."""
    text = json.dumps(encode(content), separators=(",", ":")).encode()
    if len(text) >= HEADER_BYTES:
        raise Invalid(f"environments of {len(text)} bytes")
    return text


def from_header(untrusted: bytes) -> Content:
    """What a disk that begins so holds; Invalid. Nothing, if it is blank."""
    text = untrusted[:HEADER_BYTES].rstrip(b"\0")
    if not text:
        return Content()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid("a template's content that is not JSON") from error
    return decode(Content, value, "content", ignore_unknown=True)
