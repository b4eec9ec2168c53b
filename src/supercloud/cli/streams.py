"""``logs`` and ``events``: what keeps coming, until it ends or Ctrl-C."""

import argparse
import json
import sys
import time
from collections.abc import Iterator

from supercloud.cli import client
from supercloud.cli.failure import printable
from supercloud.cli.listing import environment_path
from supercloud.cli.streaming import stream
from supercloud.model.errors import Permanent

LINE_MAX_BYTES = 1 << 20


def logs(arguments: argparse.Namespace) -> None:
    """Print an environment's output as it is, or as JSON lines."""
    path = client.path(
        "uclouds",
        *environment_path(arguments.environment),
        "logs",
        follow="1" if arguments.follow else "",
        tail=arguments.tail if arguments.tail >= 0 else "",
    )
    for chunk in _lines(path, arguments) if arguments.json else _chunks(path, arguments):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def _chunks(path: str, arguments: argparse.Namespace) -> Iterator[bytes]:
    with stream(path, timeout_s=_timeout(arguments)) as response:
        while chunk := response.read1(1 << 16):
            yield chunk


def _lines(path: str, arguments: argparse.Namespace) -> Iterator[bytes]:
    with stream(path, timeout_s=_timeout(arguments)) as response:
        while line := response.readline(LINE_MAX_BYTES):
            text = line.decode(errors="replace").rstrip("\n")
            yield json.dumps({"line": text}).encode() + b"\n"


def _timeout(arguments: argparse.Namespace) -> float | None:
    return None if arguments.follow else client.TIMEOUT_S


def events(arguments: argparse.Namespace) -> None:
    """Print events, one a line."""
    path = client.path(
        "events",
        ucloud=arguments.ucloud,
        since=arguments.since,
        follow="1" if arguments.follow else "",
    )
    with stream(path, timeout_s=_timeout(arguments)) as response:
        while line := response.readline(LINE_MAX_BYTES):
            print(line.decode().rstrip() if arguments.json else _event(line), flush=True)


def _event(line: bytes) -> str:
    try:
        event = json.loads(line)
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time_s"]))
        subject = "/".join(part for part in (event["ucloud"], event["subject"]) if part)
        text = f"{event['code']}  {subject}  {event.get('message', '')}"
    except (ValueError, KeyError, TypeError) as error:
        raise Permanent(f"the control plane sent what is no event: {line[:80]!r}") from error
    mark = {"warning": "! ", "error": "!! "}.get(event.get("severity", ""), "")
    return printable(f"{moment}  {mark}{text}".rstrip())
