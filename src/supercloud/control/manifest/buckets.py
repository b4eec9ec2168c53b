"""What is wrong with the buckets of a manifest, and with who uses them."""

from collections.abc import Sequence

from supercloud.control.manifest.problems import Problems
from supercloud.model.resources import Bucket, Environment
from supercloud.model.sizes import format_size
from supercloud.wire.checkpoints import BUCKET as CHECKPOINTS

STORE_MAX_BYTES = 1 << 44
"""All buckets of a U-Cloud are in one store; it has room for so much."""

RESERVED = ("supercloud-ready", CHECKPOINTS)
"""The store's own, and that of checkpoints."""


def check(
    buckets: Sequence[tuple[int, Bucket]],
    environments: Sequence[tuple[int, Environment]],
    problems: Problems,
) -> None:
    """Note every problem; each bucket and environment comes with its place in the manifest."""
    total_bytes = 0
    for index, bucket in buckets:
        total_bytes += bucket.quota_bytes
        if bucket.name in RESERVED:
            message = f"found {bucket.name!r}, which is one of the store's own"
            problems.at_path(f"buckets[{index}].name", message)
        if total_bytes > STORE_MAX_BYTES:
            message = f"with it all are {format_size(total_bytes)}, allowed are at most "
            message += f"{format_size(STORE_MAX_BYTES)} for the buckets of a U-Cloud"
            problems.at_path(f"buckets[{index}].quota", message)
            break
    for index, environment in environments:
        _uses(f"environments[{index}]", environment, problems)


def _uses(path: str, environment: Environment, problems: Problems) -> None:
    seen: set[str] = set()
    for number, use in enumerate(environment.buckets):
        if use.name in seen:
            problems.at_path(f"{path}.buckets[{number}].name", f"found {use.name!r} twice")
        seen.add(use.name)
