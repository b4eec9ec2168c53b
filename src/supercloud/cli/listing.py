"""``ps``, ``ls``, ``inspect``, ``version`` and ``ca``: what is, printed."""

import argparse
import json
import time
from typing import Any

from supercloud import __version__
from supercloud.cli import client
from supercloud.cli.failure import Unavailable
from supercloud.cli.table import age, table, tree
from supercloud.model.errors import NotFound

PS = ("NAME", "KIND", "STATE", "PROVIDER/HOST", "ADDRESS", "URL", "RESTARTS", "AGE")
CHECKPOINT = "CHECKPOINT"

LS = ("NAME", "STATE", "PLATFORMS", "ENVIRONMENTS", "SERVING")


def ps(arguments: argparse.Namespace) -> None:
    """Print a table of environments."""
    rows = client.get(client.path("environments", ucloud=arguments.ucloud))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(ps_table(rows, several=len({item["ucloud"] for item in rows}) > 1))


def ps_table(rows: list[dict[str, Any]], *, several: bool) -> str:
    """The rows of ``ps``; with the age of last checkpoints, if there are any."""
    now_s = time.time()
    cells = [_row(item, now_s, several=several) for item in rows]
    if not any(item.get("checkpoint_s") for item in rows):
        return table(PS, cells)
    ages = [_checkpoint(item, now_s) for item in rows]
    return table((*PS, CHECKPOINT), [(*row, age) for row, age in zip(cells, ages, strict=True)])


def _checkpoint(item: dict[str, Any], now_s: float) -> str:
    taken_s = item.get("checkpoint_s", 0)
    return f"{item['checkpoint']}, {age(taken_s, now_s)} ago" if taken_s else ""


def _row(item: dict[str, Any], now_s: float, *, several: bool) -> tuple[str, ...]:
    """An ``EnvironmentRow`` under the columns ``PS``; ``several``: with its U-Cloud's name."""
    place = "/".join(part for part in (item.get("provider"), item.get("host")) if part)
    return (
        f"{item['ucloud']}/{item['name']}" if several else item["name"],
        item["kind"],
        item["state"],
        place,
        item.get("address", ""),
        " ".join(item.get("urls", ())),
        str(item.get("restarts", 0)),
        age(item.get("started_s") or item.get("created_s", 0), now_s),
    )


def ls(arguments: argparse.Namespace) -> None:
    """Print a table of U-Clouds, or their names alone."""
    views = client.get(client.path("uclouds"))
    if arguments.json:
        print(json.dumps(views, indent=2))
    elif arguments.quiet:
        print("".join(f"{view['name']}\n" for view in views), end="")
    else:
        print(table(LS, map(_ucloud_row, views)))


def _ucloud_row(view: dict[str, Any]) -> tuple[str, ...]:
    environments = view["environments"]
    serving = sum(item["state"] == "serving" for item in environments)
    counts = (len(view["platforms"]), len(environments), serving)
    return (view["name"], view["state"], *map(str, counts))


def inspect(arguments: argparse.Namespace) -> None:
    """Print all that is known of a U-Cloud or an environment."""
    name = arguments.name
    if "/" not in name and name in {view["name"] for view in client.get(client.path("uclouds"))}:
        shown = client.get(client.path("uclouds", name))
    else:
        shown = client.get(client.path("uclouds", *environment_path(name)))
    print(json.dumps(shown, indent=2) if arguments.json else "\n".join(tree(shown)))


def environment_path(name: str) -> tuple[str, str, str]:
    """``UCLOUD, environments, NAME``; without ``UCLOUD/`` the only one that has it is found."""
    ucloud, slash, environment = name.rpartition("/")
    if slash:
        return ucloud, "environments", environment
    rows = client.get(client.path("environments"))
    found = sorted(row["ucloud"] for row in rows if row["name"] == name)
    if len(found) == 1:
        return found[0], "environments", name
    if found:
        names = ", ".join(f"{ucloud}/{name}" for ucloud in found)
        raise NotFound(f"several U-Clouds have an environment {name!r}", hint=f"one of {names}")
    raise NotFound(f"no environment {name!r}", hint=f"there are {_some(rows)}")


def _some(rows: list[dict[str, Any]]) -> str:
    names = [str(row["name"]) for row in rows]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none at all"


def version(arguments: argparse.Namespace) -> None:
    """Print the versions of both sides; a control plane that does not run is no error."""
    try:
        control: dict[str, Any] | None = client.get(client.path("version"))
    except Unavailable:
        control = None
    if arguments.json:
        print(json.dumps({"version": __version__, "control_plane": control}))
        return
    print(f"supercloud     {__version__}")
    print(f"control plane  {control['version'] if control else 'not running'}")


def ca(arguments: argparse.Namespace) -> None:
    """Print the user's certificate authority (PEM); no secret."""
    answer = client.get(client.path("ca"), start=True)
    print(json.dumps(answer) if arguments.json else answer["ca_pem"].rstrip())
