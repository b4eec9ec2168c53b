"""YAML text to a tree of nodes that know their lines, within limits.

The parser's events are read one by one, so that a hostile file ends at the first limit that it
breaks. Scalars stay text: what a plain ``NO`` or ``8080`` means is decided by the field that it
stands in, so that YAML 1.1's surprises (``no`` a boolean, ``1:30`` a number) do not occur. An
alias counts as all that it stands for: that is what defuses bombs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from supercloud.model.errors import Invalid

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class Node:
    """A place in the file (``line`` and ``column`` from 1) and what is there.

    One of: ``text`` (``plain`` when it was not quoted), ``items``, ``entries`` (key -> the key's
    node and the value's). ``weight`` counts the nodes below, aliases expanded.
    """

    line: int
    column: int
    text: str | None = None
    plain: bool = False
    items: list["Node"] | None = None
    entries: dict[str, tuple["Node", "Node"]] | None = None
    weight: int = 1

    @property
    def is_nothing(self) -> bool:
        """A value left out, or null."""
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")

    def described(self) -> str:
        """What was found, for a message."""
        if self.items is not None:
            return f"a list of {len(self.items)}"
        if self.entries is not None:
            return "a mapping"
        text = self.text or ""
        bare = self.plain and re.fullmatch(r"[-+0-9.]{1,20}", text)
        return "nothing" if self.is_nothing else text if bare else shown(text)


def shown(text: str) -> str:
    """Untrusted text, fit for a message."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def fail(file: str, line: int, column: int, message: str, *, hint: str = "") -> NoReturn:
    """Raise Invalid for a place in the file."""
    where = f"{file}:{line}:{column}"
    error = {"where": where, "message": message, **({"hint": hint} if hint else {})}
    raise Invalid(message, where=where, hint=hint, details={"errors": [error]})


def read_tree(untrusted_text: str | bytes, *, file: str) -> Node:
    """The root node of the only document; Invalid with ``file:line:column`` if there is none."""
    text = _decoded(untrusted_text, file)
    try:
        builder = _Builder(file, yaml.parse(text, Loader=_LOADER))
        return builder.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        fail(file, line, column, f"not YAML: {_reason(error)}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else 1
        fail(file, line, 1, f"not YAML: a character that is not allowed ({error.reason})")
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as an escape \UFFFFFFFF
        fail(file, 1, 1, f"not YAML: {error!s:.200}")


def _reason(error: yaml.MarkedYAMLError) -> str:
    parts = [part for part in (error.context, error.problem) if part]
    return ", ".join(parts)[:300] or "cannot be read"


def _decoded(untrusted: str | bytes, file: str) -> str:
    if len(untrusted) > MAX_BYTES:
        fail(file, 1, 1, f"found {len(untrusted)} bytes, allowed are at most {MAX_BYTES} (1 MiB)")
    try:
        if isinstance(untrusted, str):
            untrusted.encode()
            return untrusted.removeprefix("\ufeff")
        return untrusted.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fail(file, line, 1, "not YAML: the text is not UTF-8")
    except UnicodeEncodeError:
        fail(file, 1, 1, "not YAML: the text has characters that UTF-8 has not")


@dataclass
class _Builder:
    file: str
    events: Iterator[Any]
    anchors: dict[str, Node | None] = field(default_factory=dict)  # None: still open
    count: int = 0

    def document(self) -> Node:
        event = self._next(yaml.StreamStartEvent)
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            fail(self.file, 1, 1, "found an empty file, allowed is one manifest")
        root = self._node(next(self.events), 0)
        self._next(yaml.DocumentEndEvent)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._fail(event, "found a second document, allowed is one manifest a file")
        return root

    def _next(self, kind: type) -> Any:
        event = next(self.events)
        if not isinstance(event, kind):
            self._fail(event, "not YAML: a document that does not end")
        return event

    def _fail(self, event: Any, message: str, *, hint: str = "") -> NoReturn:
        fail(self.file, event.start_mark.line + 1, event.start_mark.column + 1, message, hint=hint)

    def _node(self, event: Any, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self._fail(event, f"found nesting deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._counted(event, 1)
        if event.tag not in (None, "!"):
            self._fail(event, f"found the tag {shown(event.tag)}, allowed are values without tags")
        anchor = event.anchor
        if anchor:
            self.anchors[anchor] = None
        node = self._content(event, depth)
        if anchor:
            self.anchors[anchor] = node
        return node

    def _content(self, event: Any, depth: int) -> Node:
        node = Node(event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.ScalarEvent):
            node.text, node.plain = event.value, event.implicit[0]
        elif isinstance(event, yaml.SequenceStartEvent):
            self._sequence(node, depth)
        else:
            self._mapping(node, depth)
        return node

    def _counted(self, event: Any, weight: int) -> None:
        self.count += weight
        if self.count > MAX_NODES:
            self._fail(event, f"found more than {MAX_NODES} values (aliases counted in full)")

    def _alias(self, event: Any) -> Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            what = "inside itself" if event.anchor in self.anchors else "without its anchor"
            self._fail(event, f"found the alias *{event.anchor!s:.60} {what}")
        self._counted(event, node.weight)
        return node

    def _sequence(self, node: Node, depth: int) -> None:
        node.items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item = self._node(event, depth + 1)
            node.items.append(item)
            node.weight += item.weight

    def _mapping(self, node: Node, depth: int) -> None:
        node.entries = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(next(self.events), depth + 1)
            if key.text is None:
                self._fail(event, f"found {key.described()} as a key, allowed is a text")
            if key.text in node.entries:
                first = node.entries[key.text][0].line
                self._fail(event, f"found {shown(key.text)} twice, first in line {first}")
            node.entries[key.text] = (key, value)
            node.weight += key.weight + value.weight
