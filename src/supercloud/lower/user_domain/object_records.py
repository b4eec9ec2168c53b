"""What this domain remembers of its object store: capacity, who uses it, its TLS identity.

::

    DIRECTORY/objects.json    capacity, and who may use what; never a data key
    DIRECTORY/tls.key         made here, shown to the store's own domain only
    DIRECTORY/tls.pem         the certificate over it, and its chain
"""

import os
from dataclasses import asdict, dataclass, field

from supercloud.lower.user_domain.files import Files
from supercloud.model.errors import Invalid
from supercloud.trust import keys, tls
from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.objects import STORE


@dataclass(slots=True)
class Store:
    """``users``: by name, ``read`` or ``write`` by bucket."""

    capacity_bytes: int
    tag: str = ""
    users: dict[str, dict[str, str]] = field(default_factory=dict)


class ObjectRecords:
    """In ``directory``; ``store`` is None when there is none."""

    def __init__(self, directory: str) -> None:
        self._directory, self._files = directory, Files(directory)
        self._key, self._certificate = f"{directory}/tls.key", f"{directory}/tls.pem"
        found = self._files.read()
        self.store = Store(**found[0]) if found else None

    def put(self, store: Store) -> None:
        """Keep it, on disk when this returns."""
        self._files.put(STORE, asdict(store))
        self.store = store

    def remove(self) -> None:
        """Forget the store, and its TLS identity."""
        self._files.remove(STORE)
        for path in (self._key, self._certificate):
            if os.path.exists(path):
                os.unlink(path)
        self.store = None

    def request(self, ucloud: str) -> str:
        """A certificate request while there is no certificate; else ""."""
        if os.path.exists(self._certificate):
            return ""
        keys.ensure_key(self._key)
        own = Identity(ucloud, SERVICE, STORE)
        return keys.make_request(self._key, own.uri, own.dns)

    def install(self, chain_pem: str) -> None:
        """Serve with this certificate from now on; Invalid when it is not over our key."""
        part = f"{self._certificate}.part"
        with open(part, "w", encoding="ascii") as file:
            file.write(chain_pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            tls.check_pair(part, self._key)
        except Invalid:
            os.unlink(part)
            raise
        os.replace(part, self._certificate)

    def identity(self) -> bytes:
        """Key and certificate in PEM."""
        data = b""
        for path in (self._key, self._certificate):
            with open(path, "rb") as file:
                data += file.read()
        return data
