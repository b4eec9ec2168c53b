"""The files of tests go to the two processes as ``support.sharing`` says."""

from types import SimpleNamespace

import pytest

from support.sharing import FIRST, ROOT, Sharing, has_machines

MACHINES = ["tests/system/test_hello.py", "tests/system/test_volumes.py"]
OTHERS = ["tests/unit/test_trust_keys.py", "tests/unit/test_sharing.py"]


class Node:
    """A process of pytest, as far as a scheduler sees it: it does what it is told at once."""

    def __init__(self, name: str, items: list[str]) -> None:
        self.gateway, self.shutting_down = SimpleNamespace(id=name), False
        self._items, self.given = items, []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += [self._items[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


@pytest.fixture
def shared() -> tuple[Sharing, list[Node]]:
    items = [f"{file}::test_{n}" for file in [*OTHERS, *MACHINES] for n in range(3)]
    options = SimpleNamespace(loadscopereorder=True)
    config = SimpleNamespace(getvalue=lambda _: ["2*popen"], option=options)
    made, nodes = Sharing(config), [Node(name, items) for name in ("gw0", "gw1")]
    for node in nodes:
        made.add_node(node)
        made.add_node_collection(node, items)
    made.schedule()
    return made, nodes


def files(node: Node) -> list[str]:
    return list(dict.fromkeys(item.partition("::")[0] for item in node.given))


def finish(made: Sharing, node: Node) -> None:
    for item in list(node.given):
        made.mark_test_complete(node, made.registered_collections[node].index(item))


def test_one_process_begins_with_the_longest_that_has_machines_the_other_with_the_rest(shared):
    _made, (first, second) = shared
    assert files(first) == ["tests/system/test_volumes.py"]
    assert files(second)[0] in OTHERS


def test_who_has_done_its_own_takes_the_others(shared):
    made, (first, second) = shared
    for _ in range(3):
        finish(made, second)
    assert sorted(files(second)) == sorted([*OTHERS, "tests/system/test_hello.py"])
    assert files(first) == ["tests/system/test_volumes.py"]


def test_a_file_is_run_whole_and_in_order_by_one_process(shared):
    made, nodes = shared
    for node in nodes * 4:
        finish(made, node)
    assert not set(nodes[0].given) & set(nodes[1].given)
    for node in nodes:
        by_file = {file: [i for i in node.given if i.startswith(file)] for file in files(node)}
        assert [item for items in by_file.values() for item in items] == node.given
        assert all(items == sorted(items) and len(items) == 3 for items in by_file.values())


@pytest.mark.parametrize("file", FIRST)
def test_what_is_to_come_first_is_there(file):
    assert (ROOT / file).is_file()


def test_files_with_machines_are_known_by_their_mark():
    assert all(has_machines(file) for file in MACHINES)
    assert not any(has_machines(file) for file in OTHERS)
