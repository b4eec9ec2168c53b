"""Showing what is being done: bars on a terminal, plain lines elsewhere, nothing for JSON."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from supercloud.cli.failure import printable

Show = Callable[[dict[str, Any]], None]
MARKS = {"done": "✓", "failed": "✗"}
ASCII_MARKS = {"done": "ok", "failed": "failed:"}
BARS_MAX = 16


@contextlib.contextmanager
def progress(*, as_json: bool) -> Iterator[Show]:
    """A function that shows a ``UCloudView``'s steps; call it with each new view.

    What ended before the command began is not shown.
    """
    began_s = time.time()
    if as_json:
        yield lambda _view: None
    elif sys.stdout.isatty():
        with _bars(began_s) as show:
            yield show
    else:
        yield _Lines(began_s)


def _recent(view: dict[str, Any], began_s: float) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = view.get("steps") or []
    return [step for step in steps if (step.get("ended_s") or began_s) >= began_s]


class _Lines:
    """One line when a step ends, and one when a failed one's reason changes."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._shown: set[tuple[str, str, str]] = set()

    def __call__(self, view: dict[str, Any]) -> None:
        for step in _recent(view, self._began_s):
            key = (step["subject"], step["message"], step["state"])
            if step["state"] in ASCII_MARKS and key not in self._shown:
                self._shown.add(key)
                print(_line(step, ASCII_MARKS[step["state"]]), flush=True)


def _line(step: dict[str, Any], mark: str) -> str:
    return printable(f"{mark} {step['subject']}: {step['message']} ({seconds(step):.1f} s)")


def seconds(step: dict[str, Any]) -> float:
    """How long a step took, or has taken so far."""
    if not step.get("started_s"):
        return 0.0
    return max(0.0, (step.get("ended_s") or time.time()) - float(step["started_s"]))


@contextlib.contextmanager
def _bars(began_s: float) -> Iterator[Show]:
    from rich.progress import (  # noqa: PLC0415 - heavy, and for terminals only
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
    )

    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.fields[mark]} {task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[took]:>7}", markup=False),
    )
    with Progress(*columns) as bars:
        yield _Bars(bars, began_s)


class _Bars:
    """One bar a step; when there are many, what runs and what ended last, and how many in all."""

    def __init__(self, bars: Any, began_s: float) -> None:
        self._bars, self._began_s = bars, began_s
        self._tasks: dict[tuple[str, str], Any] = {}
        self._all = bars.add_task("", total=None, mark=" ", took="", visible=False)

    def __call__(self, view: dict[str, Any]) -> None:
        steps = [step for step in _recent(view, self._began_s) if step["state"] != "waiting"]
        ended = [step for step in steps if step["state"] != "running"]
        running = [step for step in steps if step["state"] == "running"]
        last = sorted(ended, key=lambda step: float(step.get("ended_s", 0)))[-BARS_MAX:]
        shown = {_key(step) for step in [*last, *running][-BARS_MAX:]}
        for step in steps:
            self._show(step, visible=_key(step) in shown)
        text = f"{len(ended)} of {len(steps)} steps so far"
        many = len(steps) > BARS_MAX
        self._bars.update(
            self._all, description=text, total=len(steps), completed=len(ended), visible=many
        )

    def _show(self, step: dict[str, Any], *, visible: bool) -> None:
        key = _key(step)
        if key not in self._tasks:
            text = printable(f"{step['subject']}: {step['message']}")
            self._tasks[key] = self._bars.add_task(text, total=None, mark=" ", took="")
        fraction = 1.0 if step["state"] == "done" else float(step.get("fraction", -1))
        self._bars.update(
            self._tasks[key],
            total=None if fraction < 0 and step["state"] == "running" else 1.0,
            completed=max(fraction, 0.0),
            mark=MARKS.get(step["state"], " "),
            took=f"{seconds(step):.1f} s",
            visible=visible,
        )


def _key(step: dict[str, Any]) -> tuple[str, str]:
    return step["subject"], step["message"]
