"""Typed access to the documents in the store."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from supercloud.control import documents
from supercloud.control.documents import (
    KINDS,
    TEMPLATES,
    CheckpointsDocument,
    EnvironmentDocument,
    PlatformDocument,
    StoreDocument,
    TemplatesDocument,
    UCloudDocument,
    VolumeDocument,
    checkpoints_key,
    dump,
    environment_key,
    key_of,
    load,
    platform_key,
    store_key,
    templates_key,
    ucloud_key,
    volume_key,
)
from supercloud.control.store import Conflict, Row, Store
from supercloud.model.errors import NotFound

AnyDocument = TypeVar(
    "AnyDocument",
    UCloudDocument,
    PlatformDocument,
    EnvironmentDocument,
    VolumeDocument,
    StoreDocument,
    CheckpointsDocument,
    TemplatesDocument,
)


class State:
    """Documents by their names; every change is compare-and-set under the hood.

    What ``get`` and the lists give is shared and not to be changed: only ``change`` changes.
    """

    def __init__(self, store: Store) -> None:
        """``store`` holds the rows."""
        self.store = store
        self._read: dict[str, tuple[int, Any]] = {}  # key -> version and document, as last read

    async def ucloud(self, name: str) -> UCloudDocument | None:
        """A U-Cloud, or None."""
        return await self._get(UCloudDocument, ucloud_key(name))

    async def platform(self, ucloud: str, name: str) -> PlatformDocument | None:
        """A platform, or None."""
        return await self._get(PlatformDocument, platform_key(ucloud, name))

    async def environment(self, ucloud: str, name: str) -> EnvironmentDocument | None:
        """An EE, or None."""
        return await self._get(EnvironmentDocument, environment_key(ucloud, name))

    async def volume(self, ucloud: str, name: str) -> VolumeDocument | None:
        """A volume, or None."""
        return await self._get(VolumeDocument, volume_key(ucloud, name))

    async def store_document(self, ucloud: str) -> StoreDocument | None:
        """The object store of a U-Cloud, or None."""
        return await self._get(StoreDocument, store_key(ucloud))

    async def store_documents(self) -> list[StoreDocument]:
        """Those of all U-Clouds."""
        return await self._list(StoreDocument, "objects/")

    async def templates(self, ucloud: str) -> TemplatesDocument | None:
        """The templates of a U-Cloud, or None."""
        return await self._get(TemplatesDocument, templates_key(ucloud))

    async def all_templates(self) -> list[TemplatesDocument]:
        """Those of all U-Clouds."""
        return await self._list(TemplatesDocument, f"{TEMPLATES}/")

    async def uclouds(self) -> list[UCloudDocument]:
        """All U-Clouds, by name."""
        return await self._list(UCloudDocument, "ucloud/")

    async def platforms(self, ucloud: str) -> list[PlatformDocument]:
        """The platforms of a U-Cloud, by name."""
        return await self._list(PlatformDocument, platform_key(ucloud, ""))

    async def environments(self, ucloud: str = "") -> list[EnvironmentDocument]:
        """The EEs of a U-Cloud, or of all, by U-Cloud and name."""
        prefix = environment_key(ucloud, "") if ucloud else "environment/"
        return await self._list(EnvironmentDocument, prefix)

    async def volumes(self, ucloud: str = "") -> list[VolumeDocument]:
        """The volumes of a U-Cloud, or of all, by U-Cloud and name."""
        return await self._list(VolumeDocument, volume_key(ucloud, "") if ucloud else "volume/")

    async def checkpoints(self, ucloud: str = "") -> list[CheckpointsDocument]:
        """The checkpoints of a U-Cloud's EEs and platforms, or of all, by U-Cloud and name."""
        prefix = checkpoints_key(ucloud, "") if ucloud else "checkpoints/"
        return await self._list(CheckpointsDocument, prefix)

    async def checkpoints_of(self, ucloud: str, name: str) -> CheckpointsDocument | None:
        """Those of one EE or platform, or None."""
        return await self._get(CheckpointsDocument, checkpoints_key(ucloud, name))

    async def add(self, document: documents.AnyDocument) -> None:
        """Write a document that must not be there yet. Raises Conflict."""
        await self.store.put_if_version(key_of(document), dump(document), 0)

    async def change(
        self, document: AnyDocument, mutate: Callable[[AnyDocument], object]
    ) -> AnyDocument:
        """Read the document anew, ``mutate`` it, write it if that changed it; the result.

        ``mutate`` may run several times. Raises NotFound when the document is gone.
        """
        key = key_of(document)
        while True:
            row = await self.store.get(key)
            if row is None:
                raise NotFound(
                    f"{key} is gone", hint="supercloud ps and supercloud volumes show what there is"
                )
            fresh = load(type(document), key, row.value)
            mutate(fresh)
            value = dump(fresh)
            if value == row.value:
                return fresh
            try:
                await self.store.put_if_version(key, value, row.version)
            except Conflict:
                continue
            return fresh

    async def remove(self, document: documents.AnyDocument) -> None:
        """Delete the document, whatever its version; gone already is fine."""
        key = key_of(document)
        self._read.pop(key, None)
        while (row := await self.store.get(key)) is not None:
            try:
                await self.store.delete_if_version(key, row.version)
            except Conflict:
                continue

    async def _get(self, cls: type[AnyDocument], key: str) -> AnyDocument | None:
        row = await self.store.get(key)
        if row is None:
            self._read.pop(key, None)
            return None
        return self._document(cls, row)

    async def _list(self, cls: type[AnyDocument], prefix: str) -> list[AnyDocument]:
        rows, _ = await self.store.list(prefix)
        return [self._document(cls, row) for row in rows]

    def _document(self, cls: type[AnyDocument], row: Row) -> AnyDocument:
        version, document = self._read.get(row.key, (0, None))
        if version != row.version or document is None:
            document = load(cls, row.key, row.value)
            self._read[row.key] = (row.version, document)
        return cast("AnyDocument", document)


def kind_of(key: str) -> str:
    """The kind of object that a key of the store names; "" for rows that are none."""
    kind = key.partition("/")[0]
    return kind if kind in KINDS.values() else ""
