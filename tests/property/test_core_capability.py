"""The capability algebra against a plain model: rights never widen, revocation reaches all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from supercloud.model.capability import MAX_TABLE_ENTRIES, CapabilityGraph, ObjectType, Rights
from supercloud.model.errors import Denied, Exists, NotFound

HOLDERS = range(4)
rights = st.integers(0, 127).map(Rights)
names = st.sampled_from(["", "a", "b", "c", "d"])


class Graph(RuleBasedStateMachine):
    """``model``: (holder, selector) -> (object, rights, name, parent key)."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = CapabilityGraph()
        self.model: dict[tuple[int, int], tuple[int, Rights, str, tuple[int, int] | None]] = {}
        self.closed: set[int] = set()
        self.used: set[tuple[int, int]] = set()
        for holder in HOLDERS:
            self.graph.open_table(holder)

    def taken(self, holder: int, name: str) -> bool:
        return bool(name) and any(h == holder and e[2] == name for (h, _), e in self.model.items())

    def add(self, capability, parent) -> None:
        key = (capability.holder, capability.selector)
        assert key not in self.used, "selectors are never used again"
        self.used.add(key)
        self.model[key] = (capability.object_id, capability.rights, capability.name, parent)

    def descendants(self, key: tuple[int, int]) -> set[tuple[int, int]]:
        below = {k for k, entry in self.model.items() if entry[3] == key}
        return below.union(*(self.descendants(k) for k in below))

    @rule(holder=st.sampled_from(HOLDERS), object_id=st.integers(10, 13), rights=rights, name=names)
    def mint(self, holder, object_id, rights, name):
        if holder in self.closed:
            return
        try:
            made = self.graph.insert(holder, object_id, ObjectType.MEMORY, rights, name)
        except Exists:
            assert self.taken(holder, name)
        else:
            assert not self.taken(holder, name)
            self.add(made, None)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), to=st.sampled_from(HOLDERS), rights=rights, name=names)
    def derive(self, data, to, rights, name):
        key = data.draw(st.sampled_from(sorted(self.model)))
        if to in self.closed:
            return
        source = self.graph.get(*key)
        try:
            made = self.graph.derive(source, to, rights, name)
        except Denied:
            assert not source.rights & Rights.GRANT or rights & ~source.rights
        except Exists:
            assert self.taken(to, name)
        else:
            assert source.rights & Rights.GRANT
            assert not rights & ~source.rights
            self.add(made, key)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), keep=st.booleans())
    def revoke(self, data, keep):
        key = data.draw(st.sampled_from(sorted(self.model)))
        expected = self.descendants(key) | (set() if keep else {key})
        gone = self.graph.revoke(self.graph.get(*key), keep=keep)
        assert {(c.holder, c.selector) for c in gone} == expected
        for one in expected:
            del self.model[one]

    @rule(object_id=st.integers(10, 13))
    def drop_object(self, object_id):
        expected = {k for k, entry in self.model.items() if entry[0] == object_id}
        gone = self.graph.drop_object(object_id)
        assert {(c.holder, c.selector) for c in gone} == expected
        for one in expected:
            del self.model[one]

    @rule(holder=st.sampled_from(HOLDERS))
    def close(self, holder):
        if holder in self.closed or len(self.closed) > 1:
            return
        own = {k for k in self.model if k[0] == holder}
        expected = own.union(*(self.descendants(k) for k in own))
        gone = self.graph.close_table(holder)
        assert {(c.holder, c.selector) for c in gone} == expected
        assert len(gone) == len(expected)
        self.closed.add(holder)
        for one in expected:
            del self.model[one]

    @invariant()
    def tables_are_as_in_the_model(self):
        found = {}
        for holder in [h for h in HOLDERS if h not in self.closed]:
            for capability in self.graph.entries(holder):
                parent = capability.parent
                key = (parent.holder, parent.selector) if parent else None
                found[holder, capability.selector] = (
                    capability.object_id,
                    capability.rights,
                    capability.name,
                    key,
                )
                if capability.name:
                    assert self.graph.get(holder, capability.name) is capability
        assert found == self.model

    @invariant()
    def no_chain_widens(self):
        for object_id, rights, _, parent in self.model.values():
            if parent is not None:
                assert self.model[parent][0] == object_id
                assert not rights & ~self.model[parent][1]
                assert self.model[parent][1] & Rights.GRANT


TestGraph = Graph.TestCase
TestGraph.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(selector=st.integers(-(1 << 63), 1 << 63))
def test_a_selector_that_is_not_there_is_not_found(selector):
    graph = CapabilityGraph()
    graph.open_table(1)
    with pytest.raises(NotFound):
        graph.get(1, selector)


@pytest.mark.parametrize("how", ["revoke", "drop", "close"])
def test_a_chain_as_long_as_a_table_is_taken_away_whole(how):
    graph = CapabilityGraph()
    graph.open_table(1)
    first = last = graph.insert(1, 10, ObjectType.MEMORY, Rights.GRANT, "")
    for _ in range(MAX_TABLE_ENTRIES - 1):
        last = graph.derive(last, 1, Rights.GRANT, "")
    gone = {
        "revoke": lambda: graph.revoke(first, keep=False),
        "drop": lambda: graph.drop_object(10),
        "close": lambda: graph.close_table(1),
    }[how]()
    assert len(gone) == MAX_TABLE_ENTRIES
    assert not graph.of_object(10)
