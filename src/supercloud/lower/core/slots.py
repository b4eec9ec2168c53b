"""Which uid a domain gets: a slot of the host's range, the same again for who keeps files."""

import json
import os
from collections.abc import Collection

from supercloud.model.errors import NoResources


class Slots:
    """Slots by domain name, persisted for domains with a private directory."""

    def __init__(self, path: str, count: int) -> None:
        """Go on with what the file says."""
        self._path, self._count = path, count
        self._kept: dict[str, int] = {}
        if os.path.exists(path):
            with open(path, encoding="ascii") as file:
                self._kept = {str(name): int(slot) for name, slot in json.load(file).items()}

    def choose(self, name: str, in_use: Collection[int], *, keep: bool) -> int:
        """A slot for a domain; NoResources when all are taken."""
        if keep and name in self._kept:
            return self._kept[name]
        taken = {*in_use, *self._kept.values()}
        slot = next((n for n in range(self._count) if n not in taken), None)
        if slot is None:
            raise NoResources(f"all {self._count} uids of this host are taken")
        if keep:
            self._kept[name] = slot
            self._save()
        return slot

    def release(self, name: str) -> None:
        """Forget a name whose private directory is gone."""
        if self._kept.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        with open(f"{self._path}.new", "w", encoding="ascii") as file:
            json.dump(self._kept, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self._path}.new", self._path)
