"""``buckets`` and ``services``: list them, and show or delete a bucket."""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from supercloud.cli import client, named
from supercloud.cli.table import age, rounded, table
from supercloud.model.errors import Invalid
from supercloud.model.sizes import format_size

HEADER = ("NAME", "QUOTA", "USED", "OBJECTS", "STATE", "PROVIDER/HOST", "USED BY", "OPTIONS")
SERVICES = ("SERVICE", "PROVIDER/HOST", "STATE", "MEMORY", "LIMIT", "RUNS FOR")
KIND = named.Kind("buckets", "bucket")


def run(arguments: argparse.Namespace) -> None:
    """Do what the first word says."""
    action = arguments.action
    if action != "list" and not arguments.bucket:
        raise Invalid("a bucket is missing", hint=f"supercloud buckets {action} [UCLOUD/]NAME")
    _ACTIONS[action](arguments)


def services(arguments: argparse.Namespace) -> None:
    """The user's services below the machines, as the hosts say now."""
    rows = client.get(client.path("services", ucloud=arguments.ucloud))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    several = len({row["ucloud"] for row in rows}) > 1
    now_s = time.time()
    print(table(SERVICES, (_service(row, now_s, several=several) for row in rows)))


def _service(row: dict[str, Any], now_s: float, *, several: bool) -> tuple[str, ...]:
    return (
        f"{row['ucloud']}/{row['kind']}" if several else row["kind"],
        "/".join(filter(None, (row["provider"], row["host"]))),
        f"{row['state']}: {row['reason']}" if row["reason"] else row["state"],
        rounded(row["memory_bytes"]),
        rounded(row["memory_limit_bytes"]),
        age(row["started_s"], now_s),
    )


def _list(arguments: argparse.Namespace) -> None:
    rows = client.get(client.path("buckets", ucloud=arguments.ucloud))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    several = len({row["ucloud"] for row in rows}) > 1
    print(table(HEADER, (_row(row, several=several) for row in rows)))


def _row(row: dict[str, Any], *, several: bool) -> tuple[str, ...]:
    options = ["versioning"] if row["versioning"] else []
    options += [f"expires after {row['expire_days']} d"] if row["expire_days"] else []
    known = row["used_bytes"] >= 0
    return (
        f"{row['ucloud']}/{row['name']}" if several else row["name"],
        format_size(row["quota_bytes"]),
        (rounded(row["used_bytes"]) or "0B") if known else "",
        str(row["entries"]) if known else "",
        row["state"],
        f"{row['provider']}/{row['host']}",
        " ".join(f"{name}:{how}" for name, how in row["used_by"].items()),
        ", ".join(options),
    )


def _inspect(arguments: argparse.Namespace) -> None:
    named.inspect(KIND, arguments.bucket, arguments)


def _delete(arguments: argparse.Namespace) -> None:
    named.delete(KIND, arguments.bucket, arguments)


_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "list": _list,
    "inspect": _inspect,
    "delete": _delete,
}
