"""One declaration of a field: its limits and what it means, beside its type.

The manifest's parser, its JSON Schema and its reference all read the same ``Rule``.
"""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any

NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123 label
# Shorter than a label: replicas and generated names add to it.
SHORT_NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
SHORT_LABEL = "a letter, then lower case letters, digits and '-', at most 40, not '-' at the end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is allowed in a field, and what it is for.

    ``key`` is its name in the manifest where that differs from the attribute's. ``size``: a number
    of bytes, or a text such as ``128MiB``. ``duration``: seconds, as a text such as ``10m``. Limits
    of a list or mapping: ``max_items`` on itself, ``pattern`` and ``max_length`` on each text in
    it, ``key_pattern`` on a mapping's keys.
    """

    doc: str
    key: str = ""
    size: bool = False
    duration: bool = False
    ge: float | None = None
    le: float | None = None
    max_length: int = 4096
    min_length: int = 0
    max_items: int = 10_000
    min_items: int = 0
    pattern: str = ""
    key_pattern: str = ""
    wanted: str = ""  # the pattern in words
    example: str = ""


def declared(rule: Rule, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A dataclass field under ``rule``; without default or factory it is required."""
    metadata = {"rule": rule}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is not MISSING:
        return dataclasses.field(default=default, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def rule_of(field: "dataclasses.Field[Any]") -> Rule:
    """The rule that the field was declared with."""
    rule = field.metadata["rule"]
    if not isinstance(rule, Rule):
        raise TypeError(f"{field.name} was not declared with a Rule")
    return rule


def manifest_key(field: "dataclasses.Field[Any]") -> str:
    """The field's name in a manifest."""
    return rule_of(field).key or field.name
