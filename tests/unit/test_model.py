"""The vocabulary: state tables, errors."""

import pytest

from supercloud.model import errors, states
from supercloud.model.errors import BadState

TABLES = {
    "machine": states.MACHINE,
    "platform": states.PLATFORM,
    "ee": states.ENVIRONMENT,
    "ucloud": states.UCLOUD,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_end_in_gone(name: str) -> None:
    table = TABLES[name]
    for start in table:
        seen, todo = {start}, [start]
        while todo:
            for to in table[todo.pop()] - seen:
                seen.add(to)
                todo.append(to)
        assert "gone" in seen, f"{start} never ends"


@pytest.mark.parametrize("name", TABLES)
def test_step_allows_exactly_the_table(name: str) -> None:
    table = TABLES[name]
    for state in table:
        for to in table:
            if to == state or to in table[state]:
                assert states.step(table, state, to) == to
            else:
                with pytest.raises(BadState):
                    states.step(table, state, to)


@pytest.mark.parametrize("code", errors.BY_CODE)
def test_an_error_survives_the_wire(code: str) -> None:
    sent = errors.BY_CODE[code]("what", hint="do", where="here", details={"n": 1})
    got = errors.from_wire(errors.to_wire(sent))
    assert type(got) is type(sent)
    assert vars(got) == vars(sent)
    assert code in errors.STATUS


@pytest.mark.parametrize(
    "untrusted", [None, [], {}, {"code": []}, {"code": "temporary", "details": {"delay_s": "x"}}]
)
def test_a_malformed_error_is_an_error_still(untrusted: object) -> None:
    assert isinstance(errors.from_wire(untrusted), errors.SupercloudError)


def test_exit_statuses_are_distinct() -> None:
    statuses = [exit_status for _, exit_status in errors.STATUS.values()]
    assert len(set(statuses)) == len(statuses)
