"""Records against the standard dataclasses that they stand for."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from supercloud.model import records
from supercloud.wire.codec import decode, encode


@records.dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """A record."""

    a: int
    b: str = "x"
    c: list[int] = records.field(default_factory=list)
    secret: str = records.field(default="", repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """The same."""

    a: int
    b: str = "x"
    c: list[int] = dataclasses.field(default_factory=list)
    secret: str = dataclasses.field(default="", repr=False)


@records.dataclass(frozen=True, slots=True)
class Point:
    """By position."""

    x: int
    y: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class StandardPoint:
    """The same."""

    x: int
    y: int = 2


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {"a": 1}),
    ((), {"a": 1, "b": "y", "c": [1], "secret": "s"}),
    ((), {}),
    ((), {"a": 1, "d": 2}),
    ((1,), {}),
]


@pytest.mark.parametrize(("arguments", "named"), CALLS)
def test_calls_give_the_same_or_are_refused_alike(
    arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    try:
        wanted = Standard(*arguments, **named)
    except TypeError:
        with pytest.raises(TypeError):
            Ours(*arguments, **named)
        return
    made = Ours(*arguments, **named)
    assert dataclasses.asdict(made) == dataclasses.asdict(wanted)  # type: ignore[call-overload]
    assert repr(made).replace("Ours", "Standard") == repr(wanted)


@pytest.mark.parametrize("arguments", [(1,), (1, 3), (), (1, 2, 3)])
@pytest.mark.parametrize("named", [{}, {"y": 5}, {"x": 5}])
def test_positions_and_names_mix_as_they_do_there(
    arguments: tuple[int, ...], named: dict[str, int]
) -> None:
    try:
        wanted = StandardPoint(*arguments, **named)
    except TypeError:
        with pytest.raises(TypeError):
            Point(*arguments, **named)
        return
    made = Point(*arguments, **named)
    assert (made.x, made.y) == (wanted.x, wanted.y)


def test_equality_and_hashes_go_by_class_and_values() -> None:
    assert Point(1) == Point(1, 2)
    assert hash(Point(1)) == hash(Point(1, 2))
    assert Point(1) != Point(2)
    assert Point(1) != StandardPoint(1)
    assert len({Point(1), Point(1, 2), Point(3)}) == 2


def test_nothing_of_a_record_can_be_changed_and_nothing_added() -> None:
    made = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.x = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.z = 3  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.x
    assert not hasattr(made, "__dict__")


def test_defaults_of_lists_are_each_its_own() -> None:
    one, other = Ours(a=1), Ours(a=1)
    one.c.append(1)
    assert other.c == []


def test_copies_and_pickles_are_equal() -> None:
    made = Ours(a=1, c=[1, 2])
    assert copy.deepcopy(made) == made == copy.copy(made)
    assert copy.deepcopy(made).c is not made.c
    assert pickle.loads(pickle.dumps(made)) == made
    assert dataclasses.replace(made, b="z") == Ours(a=1, b="z", c=[1, 2])


def test_the_codec_takes_them_for_dataclasses() -> None:
    assert decode(Ours, encode(Ours(a=1, c=[3]))) == Ours(a=1, c=[3])


def test_a_record_that_could_be_changed_is_no_record() -> None:
    with pytest.raises(TypeError, match="frozen"):
        records.dataclass(frozen=False, slots=True)


@pytest.mark.parametrize("extend", [dataclasses.dataclass, records.dataclass])
def test_a_dataclass_of_either_kind_may_extend_a_record(extend: Any) -> None:
    class Further(Point):
        z: int = 3

    Further = extend(frozen=True, slots=True)(Further)  # type: ignore[misc] # noqa: N806

    assert Further(1) == Further(1, 2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Further(1).x = 2  # type: ignore[misc]
