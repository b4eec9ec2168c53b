"""The store against a dictionary: every operation, in any order, concurrent or not, reopened."""

import asyncio
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from supercloud.control.store import Conflict, SqliteStore

KEYS = st.sampled_from(["a", "a/b", "a/c", "b", "b/1", "ab"])
VALUES = st.binary(max_size=40)
OFFSETS = st.sampled_from([0, 0, 0, -1, 1])  # mostly the right version


class StoreAgainstModel(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "s.db"
        self.model = {}  # key -> (value, version)
        self.log = []  # (revision, key, value or None)
        self.revision = 0
        self.open()

    def run(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 10))

    def open(self):
        async def opened():
            return await SqliteStore.open(self.path)

        self.store = self.run(opened())
        self.watch, self.since = self.store.watch("a", self.revision), len(self.log)

    def version(self, key, offset):
        return max(0, self.model.get(key, (b"", 0))[1] + offset)

    def apply(self, key, value, version):
        """What the model says of one operation: a revision or None for a conflict."""
        if version != self.model.get(key, (b"", 0))[1]:
            return None
        self.revision += 1
        if value is None:
            del self.model[key]
        else:
            self.model[key] = (value, self.revision)
        self.log.append((self.revision, key, value))
        return self.revision

    async def operate(self, key, value, version):
        try:
            if value is None:
                return await self.store.delete_if_version(key, version)
            return await self.store.put_if_version(key, value, version)
        except Conflict as error:
            assert error.found == self.found_for(key) or self.concurrent
            return None

    def found_for(self, key):
        return self.model.get(key, (b"", 0))[1]

    concurrent = False

    def delete_allowed(self, key, version):
        return version != 0 or key in self.model

    @rule(key=KEYS, value=VALUES, offset=OFFSETS)
    def put(self, key, value, offset):
        version = self.version(key, offset)
        got = self.run(self.operate(key, value, version))
        assert got == self.apply(key, value, version)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), offset=OFFSETS)
    def delete(self, data, offset):
        key = data.draw(st.sampled_from(sorted(self.model)))
        version = max(1, self.version(key, offset))
        got = self.run(self.operate(key, None, version))
        assert got == self.apply(key, None, version)

    @rule(operations=st.lists(st.tuples(KEYS, VALUES, OFFSETS), min_size=2, max_size=12))
    def many_at_once(self, operations):
        """They are decided in the order in which they were asked for."""
        asked = [(key, value, self.version(key, offset)) for key, value, offset in operations]
        self.concurrent = True

        async def all_of_them():
            return await asyncio.gather(*(self.operate(*one) for one in asked))

        got = self.run(all_of_them())
        self.concurrent = False
        assert got == [self.apply(*one) for one in asked]

    @rule()
    def reopen(self):
        self.check_watch()
        self.run(self.store.close())
        self.open()

    @rule()
    def check_watch(self):
        wanted = [item for item in self.log[self.since :] if item[1].startswith("a")]
        for revision, key, value in wanted:
            change = self.run(anext(self.watch))
            assert (change.revision, change.key) == (revision, key)
            assert (change.row.value if change.row else None) == value
        self.since = len(self.log)

    @rule(prefix=st.sampled_from(["", "a", "a/", "b", "zz"]))
    def list_prefix(self, prefix):
        rows, revision = self.run(self.store.list(prefix))
        wanted = sorted((key, *item) for key, item in self.model.items() if key.startswith(prefix))
        assert [(row.key, row.value, row.version) for row in rows] == wanted
        assert revision == self.revision

    @invariant()
    def every_row_is_the_models(self):
        if not hasattr(self, "store"):
            return
        for key in ("a", "a/b", "b"):
            row = self.run(self.store.get(key))
            assert (row and (row.value, row.version)) == self.model.get(key)

    def teardown(self):
        if hasattr(self, "store"):
            self.run(self.store.close())
            self.loop.close()
            self.directory.cleanup()


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True
)
