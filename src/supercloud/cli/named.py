"""What is kept beside the U-Clouds, by name: volumes, buckets, checkpoints."""

import time

from supercloud.cli import client
from supercloud.model.errors import NotFound, Temporary

LOOK_AGAIN_S = 0.1
DELETED_MAX_S = 120.0


class Kind:
    """A kind of things: ``plural`` in the API; ``noun`` of one, with its ``article``."""

    __slots__ = ("article", "noun", "plural")

    def __init__(self, plural: str, noun: str, article: str = "a ") -> None:
        self.plural, self.noun, self.article = plural, noun, article


def path(kind: Kind, given: str, ucloud: str) -> str:
    """The API's path of what is named; without ``UCLOUD/`` the only one of that name is found."""
    of, slash, name = given.rpartition("/")
    if slash:
        return client.path("uclouds", of, kind.plural, name)
    rows = client.get(client.path(kind.plural, ucloud=ucloud))
    found = sorted(row["ucloud"] for row in rows if row["name"] == name)
    if len(found) == 1:
        return client.path("uclouds", found[0], kind.plural, name)
    if found:
        names = ", ".join(f"{of}/{name}" for of in found)
        raise NotFound(
            f"several U-Clouds have {kind.article}{kind.noun} {name!r:.80}",
            hint=f"one of {names}",
        )
    hint = f"supercloud {kind.plural} lists them"
    raise NotFound(f"no {kind.noun} {name!r:.80}", hint=hint)


def await_gone(path: str, name: str) -> None:
    """Wait until what is being deleted is not there any more."""
    end_s = time.monotonic() + DELETED_MAX_S
    while _is_there(path):
        if time.monotonic() > end_s:
            raise Temporary(f"{name} is not gone yet; it is still being deleted")
        time.sleep(LOOK_AGAIN_S)


def _is_there(path: str) -> bool:
    try:
        client.get(path)
    except NotFound:
        return False
    return True
