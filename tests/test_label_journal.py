"""A journal is read as far as it is whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ercbatch.errors import UsageError
from ercbatch.inputs.records import Position
from ercbatch.runs.appended import Prefix
from ercbatch.runs.journal import Commit, Counts, Journal, ResumePoint

COMMIT = Commit(
    ResumePoint(Position(0, 1, 9, 1, 0), 1, Counts(3, 1, 1, 1, 5), 0.5),
    Prefix(70, "ab"),
    Prefix(9, "cd"),
)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2000), st.binary(max_size=3)),
            st.tuples(st.integers(0, 2000), st.none()),
        ),
        max_size=3,
    )
)
def test_a_journal_with_other_bytes_is_read_as_far_as_it_is_whole(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes | None]]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "x.journal"
    with Journal(path) as journal:
        journal.begin({"run": "this one"})
        journal.write(COMMIT)
    whole = data = path.read_bytes()
    for at, new in changes:
        data = data[:at] if new is None else data[:at] + new + data[at + len(new) :]
    path.write_bytes(data)
    with Journal(path) as journal:
        assert journal.identity in (None, {"run": "this one"})
        assert journal.commit in (None, COMMIT)
        if data == whole:
            assert journal.commit == COMMIT
        with pytest.raises(UsageError, match="another run"):
            Journal(path)
