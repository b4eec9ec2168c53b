"""Nodes to resources, by the declarations of ``model.resources``; every problem is noted."""

import functools
import re
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from supercloud.control.manifest.problems import Problems, did_you_mean, listed
from supercloud.control.manifest.tree import Node, shown
from supercloud.model import durations
from supercloud.model.durations import format_duration, parse_duration
from supercloud.model.errors import Unsupported
from supercloud.model.resources import API_VERSION, KIND, RESERVED, Environment, Port, UCloud
from supercloud.model.rules import Rule, manifest_key, rule_of
from supercloud.model.sizes import WANTED, format_size, parse_size

BAD: Any = object()  # stands for a value whose problem has been noted
HEADER = {"apiVersion": API_VERSION, "kind": KIND}
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}(\.[0-9]{0,18})?([eE][-+]?[0-9]{1,2})?")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False}
_BOOLEANS["FALSE"] = False


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a declaration's fields; of what may be left out, that which it is if not."""
    return {name: _present(hint) for name, hint in typing.get_type_hints(cls).items()}


def _present(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is UnionType else hint


def decode_top(root: Node, problems: Problems) -> dict[str, Any]:
    """The fields of a UCloud; a list keeps its places, with BAD where an item is wrong."""
    problems.marks[""] = root
    if root.entries is None:
        problems.at(
            root, "", f"found {root.described()}, allowed is a mapping with {_keys(UCloud)}"
        )
        return {}
    for key, wanted in HEADER.items():
        _header(root, key, wanted, problems)
    return _fields(UCloud, root, "", problems)


def _header(root: Node, key: str, wanted: str, problems: Problems) -> None:
    entry = (root.entries or {}).get(key)
    if entry is None:
        problems.at(root, key, f"is required and missing, allowed is {wanted}")
    elif entry[1].text != wanted:
        problems.at(entry[1], key, f"found {entry[1].described()}, allowed is {wanted}")


def _keys(cls: type) -> str:
    header = list(HEADER) if cls is UCloud else []
    return listed(header + [manifest_key(field) for field in fields(cls)])


def _fields(cls: Any, node: Node, path: str, problems: Problems) -> dict[str, Any]:
    entries = dict(node.entries or {})
    if cls is UCloud:
        entries = {key: entry for key, entry in entries.items() if key not in HEADER}
    values = {}
    for field in fields(cls):
        key = manifest_key(field)
        below = f"{path}.{key}" if path else key
        entry = entries.pop(key, None)
        if entry is None:
            values[field.name] = _default(field, node, below, problems)
        else:
            problems.marks[below] = entry[1]
            hint = hints_of(cls)[field.name]
            values[field.name] = _value(hint, rule_of(field), entry[1], below, problems)
    for key, (key_node, _) in entries.items():
        _unknown(cls, key, key_node, f"{path}.{key}" if path else key, problems)
    return values


def _default(field: "Field[Any]", node: Node, path: str, problems: Problems) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    problems.at(node, path, f"is required and missing: {_plain(rule_of(field).doc)}")
    return BAD


def _plain(doc: str) -> str:
    return doc.replace("`", "")


def _unknown(cls: Any, key: str, node: Node, path: str, problems: Problems) -> None:
    if key in RESERVED and cls in (UCloud, Environment):
        message = f"{key!r} is reserved for a later version, and not supported yet"
        problems.at(node, path, message, hint="remove it", kind=Unsupported)
        return
    allowed = [manifest_key(field) for field in fields(cls)]
    message = f"found the unknown field {shown(key)}, allowed are {_keys(cls)}"
    problems.at(node, path[:200], message, hint=did_you_mean(key, allowed))


def _value(hint: Any, rule: Rule, node: Node, path: str, problems: Problems) -> Any:
    """The value of a field; BAD, with its problem noted, when it is not what is allowed.

    A list may hold BAD: who builds a dataclass from it looks.
    """
    origin = get_origin(hint)
    if origin is list:
        return _list(get_args(hint)[0], rule, node, path, problems)
    if origin is dict:
        return _dict(rule, node, path, problems)
    if is_dataclass(hint):
        return _dataclass(hint, node, path, problems)
    try:
        return _scalar(hint, rule, node)
    except ValueError as error:
        wanted, *close = error.args
        problems.at(
            node,
            path,
            f"found {node.described()}, allowed is {wanted}",
            hint=close[0] if close else "",
        )
        return BAD


def _dataclass(cls: Any, node: Node, path: str, problems: Problems) -> Any:
    if cls is Port and node.text is not None:  # the short form: a bare number
        port = _value(int, rule_of(fields(Port)[0]), node, path, problems)
        return BAD if port is BAD else Port(port=port)
    if node.entries is None:
        message = f"found {node.described()}, allowed is a mapping with {_keys(cls)}"
        problems.at(node, path, message)
        return BAD
    values = _fields(cls, node, path, problems)
    return BAD if any(map(is_bad, values.values())) else cls(**values)


def is_bad(value: Any) -> bool:
    """Whether a value, or one in it, is wrong."""
    if isinstance(value, list):
        return any(item is BAD for item in value)
    return value is BAD


def _list(hint: Any, rule: Rule, node: Node, path: str, problems: Problems) -> Any:
    if node.items is None or not rule.min_items <= len(node.items) <= rule.max_items:
        wanted = f"a list of {rule.min_items} to {rule.max_items}"
        problems.at(node, path, f"found {node.described()}, allowed is {wanted}")
        return BAD
    values = []
    for index, item in enumerate(node.items):
        below = f"{path}[{index}]"
        problems.marks[below] = item
        values.append(_value(hint, rule, item, below, problems))
    return values


def _dict(rule: Rule, node: Node, path: str, problems: Problems) -> Any:
    if node.entries is None or len(node.entries) > rule.max_items:
        wanted = f"a mapping with at most {rule.max_items} entries"
        problems.at(node, path, f"found {node.described()}, allowed is {wanted}")
        return BAD
    values = {}
    for key, (key_node, item) in node.entries.items():
        below = f"{path}.{key[:80]}"
        problems.marks[below] = item
        if not re.fullmatch(rule.key_pattern, key):
            message = f"found the name {shown(key)}, allowed is {rule.key_pattern}"
            problems.at(key_node, below, message)
        values[key] = _value(str, rule, item, below, problems)
    return BAD if BAD in values.values() else values


def _scalar(hint: Any, rule: Rule, node: Node) -> Any:
    """ValueError has what is allowed as its first argument, a hint as its second."""
    if get_origin(hint) is Literal:
        return _choice(get_args(hint), node)
    if rule.size:
        return _size(rule, node)
    if rule.duration:
        return _duration(rule, node)
    if hint is bool:
        if not node.plain or node.text not in _BOOLEANS:
            raise ValueError("true or false")
        return _BOOLEANS[node.text]
    if hint in (int, float):
        return _number(hint, rule, node)
    return _text(rule, node)


def _choice(allowed: tuple[str, ...], node: Node) -> str:
    if node.text is None or node.text not in allowed:
        raise ValueError("one of " + ", ".join(allowed), did_you_mean(node.text or "", allowed))
    return node.text


def _size(rule: Rule, node: Node) -> int:
    if node.text is None:
        raise ValueError(WANTED)
    try:
        value = parse_size(node.text)
    except ValueError:
        number, letters = re.fullmatch(r"([0-9.]*) *(.*)", node.text[:40], re.DOTALL).groups()  # type: ignore[union-attr]
        unit = {"K": "KiB", "M": "MiB", "G": "GiB", "T": "TiB"}.get(letters[:1].upper())
        raise ValueError(
            WANTED, f"did you mean {number + unit!r}?" if number and unit else ""
        ) from None
    lowest, highest = int(rule.ge or 0), int(rule.le or 0)
    if not lowest <= value <= highest:
        raise ValueError(f"{format_size(lowest)} to {format_size(highest)}")
    return value


def _duration(rule: Rule, node: Node) -> int:
    lowest, highest = int(rule.ge or 0), int(rule.le or 0)
    wanted = f"{durations.WANTED}, {format_duration(lowest)} to {format_duration(highest)}"
    try:
        value = parse_duration(node.text or "")
    except ValueError:
        bare = node.text if (node.text or "").isdecimal() and len(node.text or "") < 10 else ""
        raise ValueError(wanted, f"did you mean '{bare}s'?" if bare else "") from None
    if not lowest <= value <= highest:
        raise ValueError(wanted)
    return value


def _number(hint: type, rule: Rule, node: Node) -> float:
    kind = "a whole number" if hint is int else "a number"
    wanted = f"{kind} from {rule.ge:g} to {rule.le:g}" if rule.ge is not None else kind
    pattern = _INTEGER if hint is int else _NUMBER
    if node.text is None or not node.plain or not pattern.fullmatch(node.text):
        quoted = node.text is not None and not node.plain and pattern.fullmatch(node.text)
        raise ValueError(wanted, "without quotes" if quoted else "")
    value: float = hint(node.text)
    if (rule.ge is not None and value < rule.ge) or (rule.le is not None and value > rule.le):
        raise ValueError(wanted)
    return value


def _text(rule: Rule, node: Node) -> str:
    wanted = rule.wanted or "a text"
    if node.text is None or node.is_nothing:
        raise ValueError(wanted)
    if not rule.min_length <= len(node.text) <= rule.max_length:
        raise ValueError(f"a text of {rule.min_length} to {rule.max_length} characters")
    if rule.pattern and not re.fullmatch(rule.pattern, node.text):
        raise ValueError(wanted)
    if "\0" in node.text:
        raise ValueError("a text without NUL characters")
    return node.text
