"""All that is wrong with a manifest, reported together."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from supercloud.control.manifest.tree import Node
from supercloud.model.errors import Invalid, UserError

MAX_NOTED = 1000
MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, at a place of the file."""

    line: int
    column: int
    path: str
    message: str
    hint: str = ""
    kind: type[UserError] = Invalid


@dataclass(slots=True)
class Problems:
    """What was found so far. ``marks`` maps each field path that was seen to its node."""

    file: str
    found: list[Problem] = field(default_factory=list)
    marks: dict[str, Node] = field(default_factory=dict)
    more: int = 0

    def at(self, node: Node, path: str, message: str, **more: Any) -> None:
        """Note a problem at ``node``; past the most that is noted, it is only counted."""
        if len(self.found) >= MAX_NOTED:
            self.more += 1
            return
        self.found.append(Problem(node.line, node.column, path, message, **more))

    def at_path(self, path: str, message: str, **more: Any) -> None:
        """Note a problem at a field path; one that the file leaves out is its parent's."""
        self.at(nearest(self.marks, path), path, message, **more)

    def raise_if_any(self) -> None:
        """Raise all problems at once: as what they all are, else as Invalid."""
        if self.found:
            self._raise()

    def _raise(self) -> NoReturn:
        ordered = sorted(self.found, key=lambda problem: (problem.line, problem.column))
        errors = [self._described(problem) for problem in ordered[:MAX_SHOWN]]
        first = errors[0]
        kinds = {problem.kind for problem in ordered}
        kind = kinds.pop() if len(kinds) == 1 else Invalid
        raise kind(
            first["message"],
            where=first["where"],
            hint=first.get("hint", ""),
            details={"errors": errors, "count": len(ordered) + self.more},
        )

    def _described(self, problem: Problem) -> dict[str, str]:
        where = f"{self.file}:{problem.line}:{problem.column} {problem.path}".rstrip()
        described = {"where": where, "message": problem.message}
        return {**described, "hint": problem.hint} if problem.hint else described


def nearest(marks: dict[str, Node], path: str) -> Node:
    """The node of ``path`` or of the closest parent that is in the file."""
    while path and path not in marks:
        path = path.rpartition(".")[0]
        if path not in marks:
            path = path.rpartition("[")[0] if path.endswith("]") else path
    return marks.get(path) or Node(1, 1)


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """A hint with the closest of what is allowed, if one is close."""
    close = difflib.get_close_matches(found, list(allowed), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def listed(words: Iterable[str]) -> str:
    """Words for a message: ``a, b, c``, shortened when there are many."""
    words = list(words)
    return ", ".join(words[:20]) + (", ..." if len(words) > 20 else "") or "none"
