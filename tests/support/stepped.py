"""Actors in threads of which one at a time runs, from one effect on the store to the next.

A schedule decides who goes on and who dies where, so that a failing order of effects is found again
and shrinks. Listings go key by key and see what happens meanwhile.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator

from supercloud.model.errors import SupercloudError
from supercloud.services.checkpoint.backend import Item, Memory


class Killed(BaseException):
    """The actor is dead: none of its effects happen any more."""


class Actor:
    """Runs ``body(backend)``, a step whenever ``step`` is called."""

    def __init__(self, shared: Memory, body: Callable[["Stepped"], None]) -> None:
        self.finished = False
        self.error: BaseException | None = None
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._fate = ""
        backend = Stepped(shared, self)
        self._thread = threading.Thread(target=self._run, args=(body, backend), daemon=True)
        self._thread.start()

    def step(self, fate: str = "") -> None:
        """Up to the next effect. ``fate``: die ``before`` or ``after`` this one."""
        self._fate = self._fate or fate
        self._go.release()
        self._parked.acquire()

    def step_to_end(self) -> None:
        """All that is left of it; what went wrong is raised."""
        while not self.finished:
            self.step()
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        """Dead where it stands."""
        while not self.finished:
            self.step("before")
        self._thread.join()

    def park(self) -> None:
        """In the actor's thread: wait for the turn."""
        if self._fate:
            raise Killed
        self._parked.release()
        self._go.acquire()
        if self._fate == "before":
            raise Killed

    def after(self) -> None:
        """In the actor's thread: the effect has happened."""
        if self._fate == "after":
            raise Killed

    def _run(self, body: Callable[["Stepped"], None], backend: "Stepped") -> None:
        self._go.acquire()
        try:
            body(backend)
        except (SupercloudError, Killed):
            pass
        except BaseException as error:
            self.error = error
        self.finished = True
        self._parked.release()


class Stepped:
    """The shared objects, as one actor gets at them."""

    def __init__(self, shared: Memory, actor: Actor) -> None:
        self._shared, self._actor = shared, actor

    def put(self, key: str, data: bytes | bytearray) -> None:
        self._actor.park()
        self._shared.put(key, data)
        self._actor.after()

    def get(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        self._actor.park()
        data = self._shared.get(key, offset, size)
        self._actor.after()
        return data

    def delete(self, key: str) -> None:
        self._actor.park()
        self._shared.delete(key)
        self._actor.after()

    def list(self, prefix: str) -> Iterator[Item]:
        last = ""
        while True:
            self._actor.park()
            keys = sorted(key for key in self._shared.objects if key.startswith(prefix))
            at = bisect_right(keys, last)
            self._actor.after()
            if at == len(keys):
                return
            last = keys[at]
            yield Item(last, len(self._shared.objects[last]))
