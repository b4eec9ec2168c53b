"""``checkpoint``, ``restore`` and ``checkpoints``: take them, go back to one, see what there is."""

import argparse
import json
import time
from typing import Any

from supercloud.cli import client, named
from supercloud.cli.failure import printable
from supercloud.cli.progress import progress
from supercloud.cli.table import age, rounded, table
from supercloud.model.durations import format_duration
from supercloud.model.errors import BadState, Invalid, Temporary, from_wire

HEADER = ("NAME", "OF", "STATE", "EVERY", "KEPT", "LAST", "AGE", "NEXT IN", "STORED")
ONE = ("NUMBER", "AGE", "ENGINE", "PAUSE", "MEMORY", "DIRTY", "DISK", "STORED", "PROVIDER/HOST", "")
LOOK_AGAIN_S = 0.15
UP = ("running", "serving", "unready")
KIND = named.Kind("checkpoints", "checkpoints of", article="")


def take(arguments: argparse.Namespace) -> None:
    """Take one of each that is named, all at the same time, and wait until they are stored."""
    names = [*arguments.names, *arguments.platform]
    if not names:
        raise Invalid("a name is missing", hint="supercloud checkpoint [UCLOUD/]NAME ...")
    paths = [named.path(KIND, name, "") for name in names]
    asked = {path: client.call("POST", f"{path}/take", {})["id"] for path in paths}
    if arguments.no_wait:
        views = [client.get(path) for path in paths]
    else:
        views = _await_taken(asked, arguments)
    if arguments.json:
        print(json.dumps(views))
        return
    for view in views:
        print(printable(_taken(view)))


def _await_taken(asked: dict[str, str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    end_s = time.monotonic() + arguments.timeout
    with progress(as_json=arguments.json) as show:
        while True:
            views = [client.get(path) for path in asked]
            show({"steps": [step for view in views for step in view["steps"]]})
            tasks = [view["task"] for view in views]
            if all(task["done"] or task["id"] not in asked.values() for task in tasks):
                break
            if time.monotonic() > end_s:
                why = "; ".join(view["reason"] for view in views if view["reason"])
                raise Temporary(f"not done yet, but still being taken{why and f': {why}'}")
            time.sleep(LOOK_AGAIN_S)
    for task in tasks:
        if task["error"]:
            raise from_wire(task["error"])
    return views


def _taken(view: dict[str, Any]) -> str:
    subject = f"{view['ucloud']}/{view['name']}"
    task = view["task"] or {}
    found = [item for item in view["checkpoints"] if item["number"] == task.get("number")]
    if not found:
        return f"{subject}: a checkpoint is being taken; see supercloud checkpoints {subject}"
    one = found[0]
    what = "all of its memory" if one["base"] else f"{rounded(one['dirty_bytes']) or '0B'} dirty"
    return (
        f"{subject}: checkpoint {one['number']}, stood still for {one['pause_ms']:.0f} ms "
        f"({what}), {rounded(one['new_bytes']) or '0B'} stored"
    )


def restore(arguments: argparse.Namespace) -> None:
    """Go back to a checkpoint, and wait until what was there runs."""
    if bool(arguments.name) == bool(arguments.platform):
        hint = "supercloud restore [UCLOUD/]NAME, or --platform [UCLOUD/]NAME"
        raise Invalid("one name is needed, of an environment or a platform", hint=hint)
    path = named.path(KIND, arguments.name or arguments.platform, "")
    body = {"checkpoint": arguments.checkpoint, "to": arguments.to}
    of = client.get(path)
    place = client.path("uclouds", of["ucloud"], "environments", of["name"])
    before = client.get(place)["uid"] if of["of"] == "environment" else ""
    done = client.call("POST", f"{path}/restore", body, timeout_s=arguments.timeout)
    if not arguments.no_wait:
        _await_restored(path, done, before, arguments)
    if arguments.json:
        print(json.dumps(done))
        return
    how = "goes back" if arguments.no_wait else "is back"
    text = f"{done['ucloud']}/{done['name']} {how} at checkpoint {done['number']}"
    print(printable(f"{text}, on {done['platform']}"))
    if volumes := ", ".join(done.get("volumes", [])):
        print(printable(f"so are its volumes ({volumes}): what was written to them since is lost"))


def _await_restored(
    path: str, done: dict[str, Any], before: str, arguments: argparse.Namespace
) -> None:
    """``before`` is the uid of the EE that is made anew: how that one was counts no more."""
    end_s = time.monotonic() + arguments.timeout
    name, of_ucloud = done["name"], client.path("uclouds", done["ucloud"])
    with progress(as_json=arguments.json) as show:
        while True:
            view = client.get(of_ucloud)
            subjects = (f"environment/{name}", f"platform/{name}")
            show({"steps": [step for step in view["steps"] if step["subject"] in subjects]})
            restoring = client.get(path)["restoring"]
            if restoring and restoring != done["number"]:
                raise BadState(
                    f"{name} is being restored from checkpoint {restoring} meanwhile",
                    hint="another command asked for that; restore again when it is back",
                )
            if not restoring and _is_up(view, name):
                return
            _check_failed(view, name, before)
            if time.monotonic() > end_s:
                raise Temporary(f"{name} is not back yet; it is still being worked on")
            time.sleep(LOOK_AGAIN_S)


def _is_up(view: dict[str, Any], name: str) -> bool:
    states = {item["name"]: item["state"] for item in view["environments"]}
    states |= {item["name"]: item["state"] for item in view["platforms"]}
    return states.get(name) in (*UP, "exited", "ready")


def _check_failed(view: dict[str, Any], name: str, before: str) -> None:
    if not before:
        if view.get("error"):
            raise from_wire(view["error"])
        return
    item = client.get(client.path("uclouds", view["name"], "environments", name))
    if item["state"] == "failed" and item["uid"] != before:
        raise BadState(
            f"{name} failed: {item['reason']}",
            hint=f"supercloud checkpoints {view['name']}/{name}, and restore another one",
        )


def run(arguments: argparse.Namespace) -> None:
    """List all, or those of one or of a U-Cloud; or delete."""
    first, second = arguments.first, arguments.second
    if first == "delete":
        if not second:
            raise Invalid("a name is missing", hint="supercloud checkpoints delete [UCLOUD/]NAME")
        _delete(arguments, second)
    elif first and not second:
        _find(arguments, first)
    elif first:
        raise Invalid(f"found {first!r:.80}, allowed is delete", hint="supercloud checkpoints -h")
    else:
        _list(arguments)


def _find(arguments: argparse.Namespace, name: str) -> None:
    """Those of one; of a U-Cloud, if nothing else has that name."""
    rows = client.get(client.path("checkpoints", ucloud=arguments.ucloud))
    of_ucloud = [row for row in rows if row["ucloud"] == name]
    if of_ucloud and not any(row["name"] == name for row in rows):
        _list(arguments, of_ucloud)
    else:
        _show(arguments, name)


def _list(arguments: argparse.Namespace, rows: list[dict[str, Any]] | None = None) -> None:
    if rows is None:
        rows = client.get(client.path("checkpoints", ucloud=arguments.ucloud))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    several = len({row["ucloud"] for row in rows}) > 1
    now_s = time.time()
    print(table(HEADER, (_row(row, now_s, several=several) for row in rows)))
    for row in rows:
        if row.get("hint"):
            print(printable(f"{row['name']}: what to do: {row['hint']}"))


def _row(row: dict[str, Any], now_s: float, *, several: bool) -> tuple[str, ...]:
    failed = row["state"] == "failed" or row["reason"]
    left_s = max(0, int(row["next_s"] - now_s))
    return (
        f"{row['ucloud']}/{row['name']}" if several else row["name"],
        row["of"],
        f"{row['state']}: {row['reason']}" if failed and row["reason"] else row["state"],
        format_duration(row["every_s"]) if row["every_s"] else "",
        f"{row['kept']}/{row['keep']}" if row["keep"] else str(row["kept"]),
        str(row["last"] or ""),
        age(row["last_s"], now_s),
        f"{left_s}s" if row["next_s"] else "",
        rounded(row["new_bytes"]),
    )


def _show(arguments: argparse.Namespace, name: str) -> None:
    view = client.get(named.path(KIND, name, arguments.ucloud))
    if arguments.json:
        print(json.dumps(view, indent=2))
        return
    now_s = time.time()
    if view["checkpoints"]:
        print(table(ONE, (_one(item, now_s) for item in view["checkpoints"])))
    else:
        of = "--platform " if view["of"] == "platform" else ""
        subject = f"{view['ucloud']}/{view['name']}"
        print(printable(f"there is none yet; supercloud checkpoint {of}{subject} takes one"))
    if view["reason"]:
        print(printable(f"{view['state']}: {view['reason']}"))
    if view.get("hint"):
        print(printable(f"  what to do: {view['hint']}"))


def _one(item: dict[str, Any], now_s: float) -> tuple[str, ...]:
    return (
        str(item["number"]),
        age(item["taken_s"], now_s),
        item["engine"],
        f"{item['pause_ms']:.0f}ms",
        rounded(item["memory_bytes"]),
        "all" if item["base"] else rounded(item["dirty_bytes"]) or "0B",
        rounded(item["disk_bytes"]),
        rounded(item["new_bytes"]),
        f"{item['provider']}/{item['host']}",
        item["restorable"],
    )


def _delete(arguments: argparse.Namespace, name: str) -> None:
    path = named.path(KIND, name, arguments.ucloud)
    client.call("POST", f"{path}/delete", {})
    named.await_gone(path, name)
    if arguments.json:
        print(json.dumps({"name": name, "state": "gone"}))
    else:
        print(printable(f"the checkpoints of {name} are gone"))


def forget(ucloud: str) -> int:
    """Have all of a U-Cloud deleted that is going; how many EEs and platforms had some."""
    asked = client.path("uclouds", ucloud, "forget-checkpoints")
    return int(client.call("POST", asked, {})["deleting"])


def await_forgotten(ucloud: str) -> None:
    """Wait until they are gone."""
    for row in client.get(client.path("checkpoints")):
        if row["ucloud"] == ucloud:
            named.await_gone(
                client.path("uclouds", ucloud, "checkpoints", row["name"]), row["name"]
            )
