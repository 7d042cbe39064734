"""What others may rely on: the names that the package exports, and the exit codes of its errors."""

from __future__ import annotations

import inspect
import pickle
import re

import ercbatch
from ercbatch import errors

PUBLIC = [
    "BundleError",
    "Dialogue",
    "ErcbatchError",
    "InputError",
    "LabeledDialogue",
    "Labeler",
    "MissingExtraError",
    "RecordError",
    "UsageError",
    "Utterance",
    "UtteranceLabel",
]


def test_public_names() -> None:
    assert sorted(ercbatch.__all__) == PUBLIC
    assert all(inspect.isclass(getattr(ercbatch, name)) for name in PUBLIC)


def test_documented_errors_are_those_of_the_module() -> None:
    """The tree in the docstring names every error, below its base, with its exit code."""
    documented = {}
    above: list[str] = []
    for row in (errors.__doc__ or "").splitlines():
        result = re.match(r"^([│ ├└─]*)(\w+Error)\s+(?:exit (\d+))?", row)
        if result:
            depth = len(result[1]) // 4
            above = [*above[:depth], result[2]]
            documented[result[2]] = (above[-2] if depth else "Exception", result[3])
    classes = {
        name: each
        for name, each in vars(errors).items()
        if inspect.isclass(each) and issubclass(each, errors.ErcbatchError)
    }
    assert documented.keys() == classes.keys()
    for name, (base, code) in documented.items():
        assert classes[name].__bases__[0].__name__ == base
        if code is not None:
            assert classes[name].exit_code == int(code)


def test_exit_codes() -> None:
    assert (errors.FINISHED_WITH_REJECTS, errors.RESUMABLE, errors.CLOSED_PIPE) == (3, 75, 141)
    assert errors.ResumableOutputError.exit_code == errors.RESUMABLE
    codes = {errors.ErcbatchError: 1, errors.UsageError: 2, errors.InputError: 4}
    assert {each: each.exit_code for each in codes} == codes


def test_record_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(errors.RecordError("json", "not JSON")))
    assert (error.code, error.reason, str(error)) == ("json", "not JSON", "not JSON")
