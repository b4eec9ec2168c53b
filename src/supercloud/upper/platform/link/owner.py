"""What the link needs from whoever owns the platforms: the control plane."""

import hashlib
import hmac
from typing import TYPE_CHECKING, Protocol

from supercloud.model.errors import Denied
from supercloud.model.events import Event
from supercloud.wire.checkpoints import CheckpointSnapshot
from supercloud.wire.messages import Blob, Deposited, Enroll, Hello, PlatformReport

if TYPE_CHECKING:
    from supercloud.upper.platform.link.session import AgentSession


class Owner(Protocol):
    """Asked and told by a ``LinkHub``. ``pin`` is ``sha256:...`` of an agent's public key."""

    async def redeem(self, asked: Enroll, pin: str) -> None:
        """Take the one-time token and remember ``pin`` as the platform's, durably; else Denied.

        The same token with the same key again is fine: the answer may have been lost.
        ``check_token`` decides it.
        """
        ...

    async def admit(self, hello: Hello, pin: str) -> None:
        """Denied unless the platform exists and ``pin`` is the one that it enrolled with."""
        ...

    async def blob(self, session: "AgentSession", digest: str) -> str:
        """The path of a blob that this platform may have; NotFound."""
        ...

    async def deposit(self, session: "AgentSession", asked: Blob) -> Deposited:
        """Have its host lay a blob down on its disk. NotFound; what the provider says."""
        ...

    async def snapshot(self, session: "AgentSession", asked: CheckpointSnapshot) -> None:
        """Snapshot the volumes of an EE that stands still; Denied unless that is expected."""
        ...

    async def connected(self, session: "AgentSession") -> None:
        """The agent is there: the session may be used."""
        ...

    async def lost(self, session: "AgentSession") -> None:
        """It went away, and no newer session has taken its place."""
        ...

    async def report(self, session: "AgentSession", report: PlatformReport) -> None:
        """What the platform runs now. Reports that came in between are left out."""
        ...

    async def event(self, session: "AgentSession", event: Event) -> None:
        """Something happened there."""
        ...


def token_hash(token: str) -> str:
    """What is kept of a token. Tokens are 256 random bits: no salt is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def check_token(token: str, kept_hash: str, enrolled_pin: str, pin: str) -> None:
    """Denied unless it is the token, and nobody else's key has enrolled with it."""
    if not kept_hash or not hmac.compare_digest(token_hash(token), kept_hash):
        raise Denied("wrong enrolment token")
    if enrolled_pin and not hmac.compare_digest(enrolled_pin, pin):
        raise Denied("the enrolment token was used already, with another key")
