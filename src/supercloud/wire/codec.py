"""JSON values to dataclasses and back, by their annotations, with limits; standard library only.

Supported annotations: str, int, float, bool, None, Any, ``Literal``, ``X | None`` and other unions
of scalars, ``list[X]``, ``tuple[X, ...]``, ``dict[str, X]``, dataclasses. Limits are put beside the
type: ``Annotated[str, Limit(max_length=64, pattern=NAME)]``. Unknown keys are refused unless
``ignore_unknown`` (a newer peer's field is not our error).
"""

import contextlib
import dataclasses
import functools
import math
import re
import types
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from supercloud.model.errors import Invalid

T = TypeVar("T")

NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123 label
MAX_ITEMS = 10_000
MAX_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Limit:
    """Bounds: numbers by ``ge`` and ``le``, texts and lists by length, texts by ``pattern``."""

    ge: float | None = None
    le: float | None = None
    max_length: int | None = None
    min_length: int | None = None
    pattern: str | None = None


Name = Annotated[str, Limit(pattern=NAME)]
Text = Annotated[str, Limit(max_length=4096)]
Sha256 = Annotated[str, Limit(pattern=r"sha256:[0-9a-f]{64}")]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def learn(*classes: type) -> None:
    """Work out the annotations of these dataclasses, and of those in them, ahead of their use."""
    for cls in classes:
        for hint in _hints(cls).values():
            learn(*_dataclasses_in(hint))


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [found for inner in get_args(hint) for found in _dataclasses_in(inner)]


def decode(cls: type[T], untrusted: object, where: str = "", *, ignore_unknown: bool = False) -> T:
    """``untrusted`` as an instance of ``cls``; Invalid with the field's path if it is none."""
    return typing.cast("T", _dataclass(cls, untrusted, where, ignore_unknown))


_PLAIN = frozenset({str, int, float, bool, type(None)})


@functools.cache
def _names(cls: type) -> tuple[str, ...] | None:
    """Of the fields of a dataclass; None of another class."""
    return tuple(field.name for field in fields(cls)) if is_dataclass(cls) else None


def encode(value: Any) -> Any:
    """The JSON-able form of a dataclass (deeply); other values pass through."""
    cls: type = type(value)
    if cls in _PLAIN:
        return value
    names = _names(cls)
    if names is not None:
        return {name: encode(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def _fail(where: str, found: object, wanted: str) -> typing.NoReturn:
    raise Invalid(f"found {found!r:.80}, allowed is {wanted}", where=where or "(top)")


def _dataclass(cls: Any, untrusted: object, where: str, ignore: bool) -> Any:
    if not isinstance(untrusted, dict):
        _fail(where, untrusted, f"an object ({cls.__name__})")
    hints, values = _hints(cls), {}
    for field in fields(cls):
        path = f"{where}.{field.name}" if where else field.name
        if field.name in untrusted:
            values[field.name] = _value(hints[field.name], untrusted[field.name], path, ignore)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise Invalid("is required and missing", where=path)
    unknown = untrusted.keys() - hints.keys()
    if unknown and not ignore:
        raise Invalid(
            f"unknown field {min(map(str, unknown))!r:.80}, allowed are {', '.join(sorted(hints))}",
            where=where or "(top)",
        )
    return cls(**values)


def _value(hint: Any, untrusted: object, where: str, ignore: bool) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        base, *extra = get_args(hint)
        value = _value(base, untrusted, where, ignore)
        for limit in extra:
            if isinstance(limit, Limit):
                _check(limit, value, where)
        return value
    if hint is Any:
        return untrusted
    if origin in (Union, types.UnionType):
        return _union(hint, untrusted, where, ignore)
    if origin is Literal:
        if untrusted not in get_args(hint) or isinstance(untrusted, bool):
            _fail(where, untrusted, "one of " + ", ".join(map(str, get_args(hint))))
        return untrusted
    if origin in (list, tuple, dict):
        return _collection(origin, get_args(hint), untrusted, where, ignore)
    if is_dataclass(hint):
        return _dataclass(hint, untrusted, where, ignore)
    return _scalar(hint, untrusted, where)


def _scalar(hint: Any, untrusted: object, where: str) -> Any:
    if hint is type(None) and untrusted is None:
        return None
    if hint is float and isinstance(untrusted, int | float) and not isinstance(untrusted, bool):
        return _finite(untrusted, where)
    if hint in (str, int, float, bool) and type(untrusted) is hint:
        if hint is str and len(typing.cast("str", untrusted)) > MAX_TEXT:
            _fail(where, "a text too long", f"at most {MAX_TEXT} characters")
        return untrusted
    if hint is dict and isinstance(untrusted, dict):
        return untrusted
    _fail(
        where,
        untrusted,
        {str: "a text", int: "a whole number", bool: "true or false"}.get(hint, str(hint)),
    )


def _finite(untrusted: float, where: str) -> float:
    """What JSON of others has no number for (``json`` reads NaN) would not be read again."""
    with contextlib.suppress(OverflowError):
        if math.isfinite(value := float(untrusted)):
            return value
    _fail(where, untrusted, "a number")


def _union(hint: Any, untrusted: object, where: str, ignore: bool) -> Any:
    members = get_args(hint)
    if untrusted is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is not type(None):
            try:
                return _value(member, untrusted, where, ignore)
            except Invalid as error:
                errors.append(error)
    raise errors[0]


def _collection(origin: Any, args: Any, untrusted: object, where: str, ignore: bool) -> Any:
    if origin is dict:
        if not isinstance(untrusted, dict) or len(untrusted) > MAX_ITEMS:
            _fail(where, untrusted, "an object")
        for key in untrusted:
            if not isinstance(key, str) or len(key) > 4096:
                _fail(where, key, "a text as key")
        return {k: _value(args[1], v, f"{where}.{k}", ignore) for k, v in untrusted.items()}
    if not isinstance(untrusted, list | tuple) or len(untrusted) > MAX_ITEMS:
        _fail(where, untrusted, f"a list of at most {MAX_ITEMS}")
    return origin(_value(args[0], v, f"{where}[{i}]", ignore) for i, v in enumerate(untrusted))


def _check(limit: Limit, value: Any, where: str) -> None:
    if value is None:
        return
    if limit.ge is not None and value < limit.ge:
        _fail(where, value, f"at least {limit.ge:g}")
    if limit.le is not None and value > limit.le:
        _fail(where, value, f"at most {limit.le:g}")
    if limit.max_length is not None and len(value) > limit.max_length:
        _fail(where, f"{len(value)} long", f"a length of at most {limit.max_length}")
    if limit.min_length is not None and len(value) < limit.min_length:
        _fail(where, value, f"a length of at least {limit.min_length}")
    if limit.pattern is not None and not re.fullmatch(limit.pattern, value):
        _fail(where, value, f"what matches {limit.pattern}")


def replace(value: T, **changes: Any) -> T:
    """``dataclasses.replace`` under the name that callers of this module need."""
    return typing.cast("T", dataclasses.replace(typing.cast("Any", value), **changes))
