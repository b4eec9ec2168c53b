"""What the tests of disks look with finds what is there: else those tests would find nothing."""

import pytest

from support.search import shown

WORD, OTHER = b"a-word-that-is-long", b"other"


@pytest.mark.parametrize("at", [0, 1, 4096 - 7, 4096, 3 * 4096 - 1, (1 << 20) + 4090])
def test_a_word_is_found_wherever_it_lies(tmp_path, at):
    (tmp_path / "deep").mkdir()
    with (tmp_path / "deep" / "disk").open("wb") as file:
        file.truncate(8 << 20)
        file.seek(at)
        file.write(WORD)
    assert shown(tmp_path, [WORD, OTHER], piece_bytes=4096) == {WORD: ["deep/disk"]}
    assert shown(tmp_path, [OTHER, WORD]) == {WORD: ["deep/disk"]}


def test_a_word_is_found_in_names_and_at_the_end_and_not_in_part(tmp_path):
    (tmp_path / f"x-{WORD.decode()}").mkdir()
    (tmp_path / "log").write_bytes(b"x" * 5000 + OTHER)
    (tmp_path / "part").write_bytes(WORD[:-1])
    assert shown(tmp_path, [WORD, OTHER]) == {WORD: [f"x-{WORD.decode()}"], OTHER: ["log"]}
