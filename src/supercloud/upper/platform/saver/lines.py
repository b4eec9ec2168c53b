"""The saver's end of the conversation with the agent."""

import json
import os
import sys
from typing import Any

from supercloud.model.errors import Invalid
from supercloud.upper.platform.saver.requests import KINDS, MAX_LINE_BYTES
from supercloud.wire.codec import decode, encode


class Lines:
    """JSON lines over two descriptors."""

    def __init__(self, source: int, sink: int) -> None:
        self._source = os.fdopen(source, "rb")
        self._sink = sink

    def next(self, *expected: type[Any] | str) -> Any:
        """The next message, one of those kinds (or a bare word); the end of input ends us."""
        line = self._source.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            sys.exit(2)  # whoever asked has gone
        [(kind, value)] = json.loads(line).items()
        if kind in expected:
            return None
        found = decode(KINDS[kind], value, kind) if kind in KINDS else None
        if not isinstance(found, tuple(e for e in expected if not isinstance(e, str))):
            raise Invalid(f"{kind!r:.40} comes unasked")
        return found

    def say(self, kind: str, value: Any = None) -> None:
        """Tell the agent."""
        text = json.dumps({kind: value if isinstance(value, dict) else encode(value)})
        data = memoryview(text.encode() + b"\n")
        while data:
            data = data[os.write(self._sink, data) :]
