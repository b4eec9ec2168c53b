"""``volumes``: list them, and do something with one."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from supercloud.cli import client, named
from supercloud.cli.failure import printable
from supercloud.cli.table import rounded, table
from supercloud.model.errors import Invalid
from supercloud.model.sizes import format_size

HEADER = ("NAME", "SIZE", "FORMAT", "STATE", "PROVIDER/HOST", "USED BY", "STORED", "SNAPSHOTS")
KIND = named.Kind("volumes", "volume")
REPLICAS = "REPLICAS"
Columns = Sequence[tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, ...]]]]


def run(arguments: argparse.Namespace) -> None:
    """Do what the first word says."""
    action = arguments.action
    hint = f"supercloud volumes {action} {_usage(action)}"
    if action != "list" and not arguments.volume:
        what = "a U-Cloud" if action == "rotate-key" else "a volume"
        raise Invalid(f"{what} is missing", hint=hint)
    if action in _WITH_SNAPSHOT and not arguments.snapshot:
        raise Invalid("a snapshot's name is missing", hint=hint)
    _ACTIONS[action](arguments)


def _usage(action: str) -> str:
    if action == "rotate-key":
        return "UCLOUD"
    return "[UCLOUD/]NAME SNAPSHOT" if action in _WITH_SNAPSHOT else "[UCLOUD/]NAME"


def _list(arguments: argparse.Namespace) -> None:
    rows = client.get(client.path("volumes", ucloud=arguments.ucloud))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    several = len({row["ucloud"] for row in rows}) > 1
    more = [(head, cells) for head, cells in _MORE if any(any(cells(row)) for row in rows)]
    header = [*HEADER, *(word for head, _ in more for word in head)]
    print(table(header, ([*_row(row, several=several), *_cells(row, more)] for row in rows)))


def _cells(row: dict[str, Any], more: Columns) -> Iterable[str]:
    return (cell for _, cells in more for cell in cells(row))


def _rates(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the last seconds, in and out: bytes a second, requests a second, mean latency."""
    rates = row.get("rates")
    if not rates:
        return ("", "")
    return tuple(
        f"{rounded(int(rates[f'{way}_bytes_per_s'])) or '0B'}/s {rates[f'{way}s_per_s']:.0f}/s"
        + (f" {latency_us / 1000:.2f}ms" if (latency_us := rates[f"{way}_latency_us"]) else "")
        for way in ("read", "write")
    )


def _replicas(row: dict[str, Any]) -> tuple[str, ...]:
    """How many are in sync, and how the others stand."""
    found = row.get("replicas", [])
    good = [one for one in found if one["state"] in ("in_sync", "joining")]
    others = [f"{one['host']} {_standing(one)}" for one in found if one not in good]
    return (", ".join([f"{len(good)}/{len(found)} in sync", *others]) if found else "",)


def _standing(replica: dict[str, Any]) -> str:
    left = replica["lacks_bytes"]
    return f"{replica['state']} {rounded(left)}" if left > 0 else str(replica["state"])


def _row(row: dict[str, Any], *, several: bool) -> tuple[str, ...]:
    return (
        f"{row['ucloud']}/{row['name']}" if several else row["name"],
        format_size(row["size_bytes"]),
        row["format"],
        row["state"],
        f"{row['provider']}/{row['host']}",
        " ".join(row["used_by"]),
        rounded(row["stored_bytes"]),
        " ".join(row["snapshots"]),
    )


def _inspect(arguments: argparse.Namespace) -> None:
    named.inspect(KIND, arguments.volume, arguments)


def _snapshot(arguments: argparse.Namespace) -> None:
    _task(arguments, "snapshot", "has the snapshot")


def _revert(arguments: argparse.Namespace) -> None:
    _task(arguments, "revert", "is back at the snapshot")


def _forget(arguments: argparse.Namespace) -> None:
    _task(arguments, "forget", "has no more the snapshot")


def _task(arguments: argparse.Namespace, what: str, done: str) -> None:
    body = {"snapshot": arguments.snapshot}
    view = client.call("POST", f"{_path(arguments)}/{what}", body)
    text = f"{view['ucloud']}/{view['name']} {done} {arguments.snapshot}"
    print(json.dumps(view) if arguments.json else printable(text))


def _backup(arguments: argparse.Namespace) -> None:
    view = client.call("POST", f"{_path(arguments)}/backup", {})
    text = f"{view['ucloud']}/{view['name']} has all that {view['copy_of']} has"
    print(json.dumps(view) if arguments.json else printable(text))


def _delete(arguments: argparse.Namespace) -> None:
    named.delete(KIND, arguments.volume, arguments)


def _accept(arguments: argparse.Namespace) -> None:
    view = client.call("POST", f"{_path(arguments)}/accept", {"root": arguments.root})
    if arguments.json:
        print(json.dumps(view))
        return
    seal = view["seal"]
    print(f"{view['name']} is taken as it is: epoch {seal['epoch']}, state {seal['sequence']}")
    sys.stdout.flush()


def _rotate_key(arguments: argparse.Namespace) -> None:
    done = client.call("POST", client.path("uclouds", arguments.volume, "rotate-key"), {})
    if arguments.json:
        print(json.dumps(done))
    else:
        print(f"the keys of {done['volumes']} volumes are wrapped under {done['wrapping_key']}")


def _path(arguments: argparse.Namespace) -> str:
    return named.path(KIND, arguments.volume, arguments.ucloud)


_MORE: Columns = ((("READ", "WRITTEN"), _rates), ((REPLICAS,), _replicas))
"""Columns that are shown when one of the rows has something in them."""
_WITH_SNAPSHOT = ("snapshot", "revert", "forget-snapshot")
_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "list": _list,
    "inspect": _inspect,
    "snapshot": _snapshot,
    "revert": _revert,
    "forget-snapshot": _forget,
    "backup": _backup,
    "delete": _delete,
    "accept": _accept,
    "rotate-key": _rotate_key,
}
