"""The authorities of all U-Clouds, one each, looked at again for renewal from time to time."""

import time
from pathlib import Path

from supercloud.trust import builder
from supercloud.trust.authority import Authority, Root

LOOK_AGAIN_S = 24 * 3600.0


class Authorities:
    """``authorities(ucloud)`` is the authority, made when first asked for."""

    def __init__(self, directory: Path, look_again_s: float = LOOK_AGAIN_S) -> None:
        """Keys and certificates are in ``directory``."""
        self.directory, self._look_again_s = directory, look_again_s
        self._known: dict[str, Authority] = {}
        self._looked_s: dict[str, float] = {}

    def __call__(self, ucloud: str) -> Authority:
        """The authority of ``ucloud``."""
        if ucloud not in self._known:
            self._take(ucloud)
        return self._known[ucloud]

    def renewed(self, ucloud: str) -> bool:
        """Whether its certificate was due and is another one now: who holds the old one lets go."""
        if ucloud not in self._known:
            return False
        if time.monotonic() - self._looked_s[ucloud] < self._look_again_s:
            return False
        before = self._known[ucloud].chain_pem
        return self._take(ucloud).chain_pem != before

    def root_pem(self) -> str:
        """The user's root certificate, made when there is none yet."""
        return builder.pem(Root.ensure(str(self.directory)).certificate).decode()

    def _take(self, ucloud: str) -> Authority:
        authority = self._known[ucloud] = Authority.ensure(str(self.directory), ucloud)
        self._looked_s[ucloud] = time.monotonic()
        return authority
