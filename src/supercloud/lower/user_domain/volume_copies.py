"""Copies of one volume into another: which are under way, and how they ended.

A copy is the block service's; it tells when one has ended. What was told is in memory only: after a
restart of this domain a copy that the service does not have under way any more is begun anew, which
does no harm, since its target is nobody's before it is done.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace

from supercloud.lower.user_domain.layers import Layers
from supercloud.lower.user_domain.volume_records import Volume
from supercloud.model.errors import BadState, Busy, Invalid, Permanent, Unsupported
from supercloud.wire.volumes import VolumeCopy, VolumeStatus

Found = Callable[[str], AbstractAsyncContextManager[Volume]]
"""A volume that nobody else works on meanwhile; NotFound."""
Told = Callable[[Volume], Awaitable[VolumeStatus]]
Done = Callable[[Volume, int], None]


@dataclass(slots=True)
class _Begun:
    """``error`` is None until it has ended, then why it failed, or empty."""

    number: int
    error: str | None = None


class Copies:
    """By the volume that is copied into."""

    def __init__(self, layers: Layers, found: Found, status: Told, done: Done) -> None:
        self._layers, self._found, self._status, self._done = layers, found, status, done
        self._begun: dict[str, _Begun] = {}

    async def copy(self, asked: VolumeCopy) -> VolumeStatus:
        """Begin to copy one into another, or say how far that is. Permanent: it failed."""
        if asked.name == asked.of:
            raise Invalid("a volume is not copied into itself", where="of")
        async with AsyncExitStack() as held:  # always in the same order
            names = sorted((asked.name, asked.of))
            volumes = {name: await held.enter_async_context(self._found(name)) for name in names}
            target, words = volumes[asked.name], ""
            if target.copied != asked.number:
                words = await self._go_on(volumes[asked.of], target, asked)
                if not words:
                    self._done(target, asked.number)
            return replace(await self._status(target), copying=words)

    def ended(self, target: str, error: str) -> None:
        """The block service says so."""
        if target in self._begun:
            self._begun[target].error = error

    async def _go_on(self, source: Volume, target: Volume, asked: VolumeCopy) -> str:
        """Begin it, or look at it: what is under way in words, or nothing when it is done.

        Permanent when it failed; asked again it is begun anew.
        """
        _may(source, target)
        name = target.spec.name
        under_way = await self._layers.copying(name)
        begun = self._begun.get(name)
        if begun is not None and begun.number == asked.number and begun.error is not None:
            del self._begun[name]
            if begun.error:
                raise Permanent(f"the copy of volume {asked.of} to {name} failed: {begun.error}")
            return ""
        if not under_way:
            await self._begin(source, asked)
            under_way = await self._layers.copying(name)
        return under_way or "it is just over"

    async def _begin(self, source: Volume, asked: VolumeCopy) -> None:
        if words := await self._layers.copying(source.spec.name):
            raise Busy(f"volume {asked.of}: {words} is under way", hint="one at a time")
        self._begun[asked.name] = _Begun(asked.number)
        try:
            await self._layers.copy(asked.of, asked.name, asked.snapshot)
        except BaseException:
            del self._begun[asked.name]
            raise


def _may(source: Volume, target: Volume) -> None:
    """BadState, Unsupported: before anything is done."""
    for volume in (source, target):
        if volume.mirrored or volume.shared is not None:
            raise Unsupported(f"volume {volume.spec.name} is kept on several hosts: it has no copy")
        if not volume.in_use:
            raise BadState(f"volume {volume.spec.name} is {volume.state}", hint="open it first")
    if target.state == "attached":
        message = f"volume {target.spec.name} is attached to {target.platform}"
        raise BadState(message, hint="what is copied into is used by nobody meanwhile")
