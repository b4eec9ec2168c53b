"""Quotas as limits and back, and how many who ask for none fit on hosts of usual sizes."""

import pytest

from supercloud.cli.doctor import LEAST_DISK_BYTES, LEAST_MEMORY_BYTES
from supercloud.lower import quota as quotas
from supercloud.lower.host.grants import Capacity, _limits
from supercloud.wire.quota import Quota

GIB = 1 << 30


@pytest.mark.parametrize("quota", [*quotas.SIZES, Quota(memory_bytes=0, disk_bytes=0, vms=0)])
def test_a_quota_survives_being_limits(quota: Quota) -> None:
    assert quotas.from_limits(quotas.to_limits(quota)) == quota


@pytest.mark.parametrize(
    ("memory_gib", "disk_gib", "vms"),
    [
        (LEAST_MEMORY_BYTES / GIB, LEAST_DISK_BYTES / GIB, [1]),
        (3.8, 12, [1]),  # what is sold as 4 GB
        (7.7, 18, [1, 1]),
        (15.5, 60, [2, 2, 1]),
        (23.5, 250, [4, 4, 1, 1]),
        (62.7, 450, [4, 4, 4, 4, 4, 4]),
    ],
)
def test_who_asks_for_no_quota_gets_what_fits(
    memory_gib: float, disk_gib: float, vms: list[int]
) -> None:
    most = Capacity(int(memory_gib * GIB), int(disk_gib * GIB * 0.95))
    left = _limits(most)["multiplexing"]
    for wanted in vms:
        quota = quotas.fitting(left["memory_bytes"], left["disk_bytes"])
        limits = quotas.to_limits(quota)
        assert quota.vms == wanted
        left["memory_bytes"] -= limits.memory_bytes
        left["disk_bytes"] -= limits.disk_bytes
        assert left["memory_bytes"] >= 0
        assert left["disk_bytes"] >= 0
