"""The codec: what fits passes unchanged, what does not names its place."""

import contextlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.model.errors import Invalid
from supercloud.wire import host, messages
from supercloud.wire.codec import Limit, Name, decode, encode


@dataclass(frozen=True, slots=True)
class Inner:
    size: Annotated[int, Limit(ge=1, le=9)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: Name
    kind: Literal["a", "b"] = "a"
    ratio: float = 1.0
    maybe: str | None = None
    inner: list[Inner] = field(default_factory=list)
    table: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("untrusted", "place", "text"),
    [
        ({}, "name", "required"),
        ({"name": 3}, "name", "a text"),
        ({"name": "UPPER"}, "name", "matches"),
        ({"name": "x\n"}, "name", "matches"),
        ({"name": "x", "kind": "c"}, "kind", "one of a, b"),
        ({"name": "x", "ratio": "1"}, "ratio", "found '1'"),
        ({"name": "x", "ratio": True}, "ratio", "found True"),
        ({"name": "x", "inner": [{"size": 1}, {"size": 10}]}, "inner[1].size", "at most 9"),
        ({"name": "x", "table": {"k": {"size": 0}}}, "table.k.size", "at least 1"),
        ({"name": "x", "inner": {}}, "inner", "a list"),
        ({"name": "x", "wrong": 1}, "(top)", "unknown field 'wrong'"),
        ([], "(top)", "an object"),
    ],
)
def test_what_does_not_fit_names_its_place(untrusted: Any, place: str, text: str) -> None:
    with pytest.raises(Invalid, match=r".+") as caught:
        decode(Outer, untrusted)
    assert caught.value.where == place
    assert text in caught.value.message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    """``json`` reads it; kept in a document it would make that unreadable for ever."""
    with pytest.raises(Invalid, match="ratio"):
        decode(Outer, parsed(f'{{"name": "x", "ratio": {text}}}'), "outer")


def parsed(text: str) -> Any:
    import json

    return json.loads(text)


def test_an_unknown_field_of_a_newer_peer_is_ignored_when_asked() -> None:
    assert decode(Outer, {"name": "x", "new": 1}, ignore_unknown=True) == Outer(name="x")


@given(
    st.builds(
        Outer,
        name=st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True),
        kind=st.sampled_from(["a", "b"]),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        maybe=st.none() | st.text(max_size=9),
        inner=st.lists(st.builds(Inner, st.integers(1, 9)), max_size=3),
        table=st.dictionaries(st.text(max_size=3), st.builds(Inner, st.integers(1, 9)), max_size=3),
    )
)
def test_what_was_encoded_decodes_to_the_same(value: Outer) -> None:
    assert decode(Outer, encode(value)) == value


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "declared",
    [
        *host.HOST.values(),
        *messages.AGENT_TO_CONTROL.values(),
        *messages.CONTROL_TO_AGENT.values(),
    ],
    ids=lambda method: method.name,
)
@given(untrusted=json)
def test_no_json_crashes_a_declared_message(declared: messages.Method, untrusted: Any) -> None:
    with contextlib.suppress(Invalid):
        decode(declared.params, untrusted, ignore_unknown=True)
