"""What is kept beside the U-Clouds, by name: volumes, buckets, checkpoints."""

import argparse
import json
import time

from supercloud.cli import client
from supercloud.cli.failure import printable
from supercloud.cli.table import tree
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


def inspect(kind: Kind, given: str, arguments: argparse.Namespace) -> None:
    """Show all that is known of what is named."""
    shown = client.get(path(kind, given, arguments.ucloud))
    print(json.dumps(shown, indent=2) if arguments.json else "\n".join(tree(shown)))


def delete(kind: Kind, given: str, arguments: argparse.Namespace) -> None:
    """Delete what is named, with its content; wait until it is gone."""
    found = path(kind, given, arguments.ucloud)
    client.call("POST", f"{found}/delete", {})
    await_gone(found, given)
    if arguments.json:
        print(json.dumps({kind.noun: given, "state": "gone"}))
    else:
        print(printable(f"{given} is gone, with all that was in it"))


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
