"""Parked connections, on which a user domain hands over the agents that dial in at its host."""

import asyncio
import logging
import random
from asyncio import StreamReader, StreamWriter
from typing import Final

from supercloud.model.errors import Denied, SupercloudError
from supercloud.providers.base import Accept
from supercloud.providers.lower_layer.dial import Connection, Dialer

PARKED: Final = 2
FIRST_DELAY_S: Final = 0.2
LAST_DELAY_S: Final = 10.0

log = logging.getLogger("supercloud.providers.lower_layer")


class Rendezvous:
    """Keeps ``PARKED`` connections waiting; each that is taken is replaced at once."""

    def __init__(self, dialer: Dialer, accept: Accept) -> None:
        self._dialer, self._accept = dialer, accept
        self._serving: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled; then the agents' connections end as well."""
        parking = [asyncio.ensure_future(self._park()) for _ in range(PARKED)]
        try:
            await asyncio.gather(*parking)
        finally:
            tasks = [*parking, *self._serving]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _park(self) -> None:
        delay_s = FIRST_DELAY_S
        while True:
            try:
                await self._take_one()
                delay_s = FIRST_DELAY_S
            except SupercloudError as error:
                level = logging.ERROR if isinstance(error, Denied) else logging.INFO
                log.log(level, "rendezvous at %s: %s", self._dialer.target, error)
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))  # noqa: S311 - not a secret
                delay_s = min(delay_s * 2, LAST_DELAY_S)

    async def _take_one(self) -> None:
        """Park one connection; when an agent is put on it, serve it beside."""
        connection = await self._dialer.connect()
        try:
            result, reader, writer = await connection.peer.call_detach("rendezvous.accept")
        except BaseException:
            await connection.close()
            raise
        name = str(result.get("name", "?"))[:64] if isinstance(result, dict) else "?"
        task = asyncio.ensure_future(self._serve(name, connection, reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(
        self, name: str, connection: Connection, reader: StreamReader, writer: StreamWriter
    ) -> None:
        """``connection`` is held on to, for its end of the stream is closed with it."""
        try:
            await self._accept(reader, writer)
        except (SupercloudError, OSError, EOFError) as error:
            log.warning("agent %s at %s: %s", name, self._dialer.target, error)
        except Exception:
            log.exception("agent %s at %s: a bug", name, self._dialer.target)
        finally:
            writer.close()
            await connection.close()
