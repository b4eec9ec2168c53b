"""Small JSON documents that outlive this domain's process: one file each, by name."""

import contextlib
import json
import os
from typing import Any


class Files:
    """A directory of them."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """All of them, by name."""
        found = []
        for file in sorted(os.listdir(self._directory)):
            if file.endswith(".json"):
                with open(f"{self._directory}/{file}", encoding="utf-8") as opened:
                    found.append(json.load(opened))
        return found

    def put(self, name: str, document: dict[str, Any]) -> None:
        """Add or replace, on disk when it returns."""
        path = self._path(name)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)

    def remove(self, name: str) -> None:
        """Gone, also when it was not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}.json"
