"""``plan``, ``up`` and ``down``: a manifest is handed over, and made so while we look on."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from supercloud.cli import checkpoints, client
from supercloud.cli.failure import Unavailable, printable
from supercloud.cli.listing import ps_table
from supercloud.cli.progress import progress
from supercloud.model.errors import Invalid, NotFound, SupercloudError, Temporary, from_wire

MANIFEST_MAX_BYTES = 1 << 20
POLL_S = 0.15
AWAY_MAX_S = 60.0  # how long a control plane that restarts is waited for
LATE_MAX = 5  # as many are named when time is up
SIGNS = {"create": "+", "change": "~", "delete": "-"}


def plan(arguments: argparse.Namespace) -> None:
    """Print what would change."""
    answer = client.call("POST", client.path("plan"), _manifest(arguments.manifest), start=True)
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return
    _print_plan(answer)


def up(arguments: argparse.Namespace) -> None:
    """Hand a manifest over, and wait until all of it serves."""
    body = _manifest(arguments.manifest)
    began_s = time.monotonic()
    applied = client.call("POST", client.path("up"), body, start=True)
    name = applied["ucloud"]
    if not arguments.json:
        _print_plan(applied["plan"])
    if arguments.no_wait:
        view = client.get(client.path("uclouds", name))
    else:
        view = _await_ready(name, applied["generation"], arguments)
    if arguments.json:
        print(json.dumps(view))
    elif arguments.no_wait:
        print(f"{name} is being worked on; see supercloud ps")
    else:
        _print_ready(view, time.monotonic() - began_s)


def down(arguments: argparse.Namespace) -> None:
    """Take a U-Cloud down, and wait until nothing of it is left but, if wished, its data."""
    name = _ucloud(arguments.ucloud)
    began_s = time.monotonic()
    _begin_down(name, arguments)
    if not arguments.no_wait:
        with progress(as_json=arguments.json) as show:
            for view in _views(name, arguments.timeout):
                if view is None or view["state"] == "gone":
                    break
                show(view)
        if arguments.checkpoints:
            checkpoints.await_forgotten(name)
    if arguments.json:
        print(json.dumps({"ucloud": name, "state": "deleting" if arguments.no_wait else "gone"}))
    elif arguments.no_wait:
        print(f"{name} is being taken down")
    else:
        print(f"{name} is gone ({time.monotonic() - began_s:.1f} s)")
        _print_kept(name)


def _begin_down(name: str, arguments: argparse.Namespace) -> None:
    """What is kept of one that is down already can go, too."""
    how = "purge" if arguments.volumes else "down"
    try:
        client.call("POST", client.path("uclouds", name, how), {})
    except NotFound:
        if not arguments.checkpoints or not checkpoints.forget(name):
            raise
    else:
        if arguments.checkpoints:
            checkpoints.forget(name)


def _print_kept(ucloud: str) -> None:
    for what in ("volumes", "buckets", "checkpoints"):
        rows = [row for row in client.get(client.path(what)) if row["ucloud"] == ucloud]
        if kept := [row["name"] for row in rows if row["state"] != "deleting"]:
            text = f"kept, with their data: {', '.join(kept)} (supercloud {what})"
            print(printable(text))


def _manifest(path: str) -> dict[str, str]:
    """The request for a manifest's file. What is too large is not read at all."""
    try:
        with open(path, "rb") as file:
            untrusted = file.read(MANIFEST_MAX_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise Invalid(
            f"cannot be read: {error.strerror}", where=path, hint="supercloud up FILE"
        ) from None
    if len(untrusted) > MANIFEST_MAX_BYTES:
        size = max(size, len(untrusted))
        raise Invalid(f"found {size} bytes, allowed are at most {MANIFEST_MAX_BYTES}", where=path)
    try:
        text = untrusted.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = untrusted.count(b"\n", 0, error.start) + 1
        raise Invalid("the text is not UTF-8", where=f"{path}:{line}:1") from None
    directory = os.path.dirname(os.path.abspath(path))
    return {"manifest": text, "file": path, "directory": directory}


def _ucloud(given: str) -> str:
    """The name of a U-Cloud that is given by name or by its manifest."""
    if os.sep in given or given.endswith((".yaml", ".yml")):
        return str(client.call("POST", client.path("name"), _manifest(given))["ucloud"])
    return given


def _views(name: str, timeout_s: float) -> Iterator[dict[str, Any] | None]:
    """The U-Cloud, again and again; None when there is none. A control plane's restart is borne."""
    end_s = time.monotonic() + timeout_s
    away_since_s = view = None
    while True:
        asked_s = time.monotonic()
        try:
            view = client.get(client.path("uclouds", name))
            away_since_s = None
            yield view
        except NotFound:
            yield None
        except (Unavailable, Temporary):
            away_since_s = away_since_s or asked_s
            if time.monotonic() - away_since_s > AWAY_MAX_S:
                raise
        if time.monotonic() > end_s:
            raise _too_late(name, view, timeout_s)
        # A large U-Cloud takes longer to describe: leave the control plane time to work on it.
        _pause(name, view, max(POLL_S, 2 * (time.monotonic() - asked_s)))


def _pause(name: str, view: dict[str, Any] | None, pause_s: float) -> None:
    """So long, or until the control plane says that the U-Cloud's state has changed."""
    end_s = time.monotonic() + pause_s
    state = view["state"] if view else ""
    wanted = client.path("uclouds", name, "state", state=state, wait_ms=int(pause_s * 1000))
    try:
        changed = bool(view) and client.get(wanted)["state"] != state
    except SupercloudError:  # the next view tells
        changed = False
    if not changed:
        time.sleep(max(0.0, end_s - time.monotonic()))


def _too_late(name: str, view: dict[str, Any] | None, timeout_s: float) -> Temporary:
    """Says what is not as it should be."""
    items = [*view["platforms"], *view["environments"]] if view else []
    late = [item for item in items if item["state"] not in ("ready", "serving")]
    texts = [f"{item['name']} is {item['state']}" + _because(item) for item in late]
    more = f" and {len(texts) - LATE_MAX} more" if len(texts) > LATE_MAX else ""
    listed = f" ({', '.join(texts[:LATE_MAX])}{more})" if texts else ""
    return Temporary(
        f"{name} is not done after {timeout_s:g} s{listed}; it is still being worked on"
    )


def _because(item: dict[str, Any]) -> str:
    return f": {item['reason']}" if item.get("reason") else ""


def _await_ready(name: str, generation: int, arguments: argparse.Namespace) -> dict[str, Any]:
    with progress(as_json=arguments.json) as show:
        for view in _views(name, arguments.timeout):
            if view is None or view["generation"] > generation:
                raise NotFound(
                    f"{name} was changed or taken down by another command meanwhile",
                    hint="supercloud ps shows how it is now; supercloud up makes it as your file",
                )
            show(view)
            if view["state"] == "ready":
                return view
            if view.get("error"):
                raise _stopped(view)
    raise AssertionError("the views of a U-Cloud do not end")


def _stopped(view: dict[str, Any]) -> SupercloudError:
    return from_wire(view["error"])


def _print_plan(answer: dict[str, Any]) -> None:
    for change in answer["changes"]:
        sign = SIGNS.get(change["action"], "?")
        details = ", ".join(change.get("details", ()))
        print(printable(f"{sign} {change['subject']}{f'  ({details})' if details else ''}"))
    if not answer["changes"]:
        print(f"{answer['ucloud']}: nothing to change")
    for warning in answer.get("warnings", ()):
        print(printable(f"! {warning}"))
    sys.stdout.flush()


def _print_ready(view: dict[str, Any], took_s: float) -> None:
    rows = view["environments"]
    print(f"\n{view['name']} is up ({took_s:.1f} s)\n")
    print(ps_table(rows, several=False))
    tries = _tries(view["name"], rows)
    if tries:
        print("\nTry next:")
        print("\n".join(f"  {line}" for line in tries))


def _tries(ucloud: str, rows: list[dict[str, Any]]) -> list[str]:
    """Commands that work on what has just come up, on what can be reached before what can't."""
    ordered = sorted(rows, key=lambda item: not item.get("urls"))
    first = {item["kind"]: item["name"] for item in reversed(ordered)}
    urls = [url for item in rows for url in item.get("urls", ()) if url.startswith("http")]
    tries = [f"curl {url}" for url in list(dict.fromkeys(urls))[:2]]
    if name := first.get("container"):
        tries += [f"supercloud exec -it {ucloud}/{name} sh", f"supercloud logs -f {ucloud}/{name}"]
    if name := first.get("vm"):
        tries.append(f"supercloud console {ucloud}/{name}")
    return [*tries, f"supercloud down {ucloud}"]
