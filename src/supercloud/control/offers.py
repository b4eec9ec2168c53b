"""What a provider offers at the moment of a decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from supercloud.model.resources import Provider
from supercloud.providers.base import HostCapacity


@dataclass(frozen=True, slots=True)
class Offer:
    """A provider entry and what it offers now; ``unreachable`` says why it offers nothing."""

    provider: Provider
    hosts: Sequence[HostCapacity]
    features: Mapping[str, str] = field(default_factory=dict)
    unreachable: str = ""
