"""``dataclass`` for the many small classes of messages, without the code that it would compile.

The standard one writes a constructor and five methods of source text for each class and compiles
them: 0.3 ms a class, which is a fifth of the start of an agent, and a quarter of a second where the
platform is emulated. Here all classes share methods that go by the fields. To type checkers, to
``fields``, ``replace`` and ``is_dataclass`` they are dataclasses, frozen and with slots.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

__all__ = ["dataclass", "field"]

T = TypeVar("T")


class _Shared:
    """The methods; ``self`` is an instance of any record."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        own = fields(self)  # type: ignore[arg-type] # whoever has the method is a dataclass
        by_position = [known for known in own if not known.kw_only] if arguments else []
        if len(arguments) > len(by_position):
            raise TypeError(f"{type(self).__name__}: {len(arguments)} values by position")
        for known, value in zip(by_position, arguments, strict=False):
            if known.name in named:
                raise TypeError(f"{type(self).__name__}: two values for {known.name}")
            named[known.name] = value
        for known in own:
            if known.name in named:
                value = named.pop(known.name)
            elif known.default is not MISSING:
                value = known.default
            elif known.default_factory is not MISSING:
                value = known.default_factory()
            else:
                raise TypeError(f"{type(self).__name__}: no value for {known.name}")
            object.__setattr__(self, known.name, value)
        if named:
            raise TypeError(f"{type(self).__name__}: no field {next(iter(named))}")

    def __repr__(self) -> str:
        own = fields(self)  # type: ignore[arg-type]
        said = (f"{known.name}={getattr(self, known.name)!r}" for known in own if known.repr)
        return f"{type(self).__qualname__}({', '.join(said)})"

    def __eq__(self, other: object) -> bool:
        return _values(self) == _values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(_values(self))

    def __setattr__(self, name: str, _value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __getstate__(self) -> tuple[Any, ...]:
        return _values(self)

    def __setstate__(self, values: tuple[Any, ...]) -> None:
        for known, value in zip(fields(self), values, strict=True):  # type: ignore[arg-type]
            object.__setattr__(self, known.name, value)


_METHODS = (
    "__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__",
    "__getstate__", "__setstate__",
)  # fmt: skip


def _values(record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, known.name) for known in fields(record))


def _record(*, frozen: bool, slots: bool, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """A class decorator. ``frozen`` and ``slots`` are what it always does, said for readers."""
    if not (frozen and slots):
        raise TypeError("records are frozen and have slots")

    def decorate(cls: type[T]) -> type[T]:
        plain = dataclasses.dataclass(
            init=False, repr=False, eq=False, match_args=False, slots=True, kw_only=kw_only
        )
        if any(map(dataclasses.is_dataclass, cls.__bases__)):  # the few that extend another one
            return dataclasses.dataclass(frozen=True, slots=True, kw_only=kw_only)(cls)
        made: Any = plain(cls)
        made.__dataclass_params__.frozen = True  # so that its subclasses may be
        for name in _METHODS:
            setattr(made, name, vars(_Shared)[name])
        return cast("type[T]", made)

    return decorate


if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    dataclass = _record
