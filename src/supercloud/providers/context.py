"""What a provider object is made from."""

from dataclasses import dataclass

from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import PinStore
from supercloud.trust.authority import Authority


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a provider object is made from.

    ``entry`` is the provider's in the manifest. ``trust_directory`` is where ``authority`` keeps
    the control plane's own certificate; ``state_directory`` is this entry's own.
    """

    ucloud: str
    entry: Entry
    authority: Authority
    trust_directory: str
    state_directory: str
    pins: PinStore
