"""Whatever call on a file fails, a labelling run can go on."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slow.kill_loop import Run, write_inputs

CALLS = {
    "open": errno.EMFILE,
    "write": errno.ENOSPC,
    "fsync": errno.EIO,
    "rename": errno.EIO,
    "ftruncate": errno.EIO,
    "unlink": errno.EACCES,
}
"""What a run calls on files -> an error that it may meet there."""


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}
"""Before any of those calls."""

LAST_CALLS = 13
"""What puts a whole output into its place."""


@pytest.mark.slow
@pytest.mark.parametrize("call", [*CALLS, *SIGNALS])
def test_run_resumes_after_any_failed_call(
    bundle_folder: Path, tmp_path: Path, faults: Path, call: str
) -> None:
    """The first of the calls fails, then the second, and so on; or a signal comes there."""
    inputs = write_inputs(tmp_path / "in", 12, random.Random(2))
    calm = Run(inputs, tmp_path / "calm", ("--bundle", str(bundle_folder)))
    calm.finish()
    expected = calm.result()
    fault = {
        "LD_PRELOAD": str(faults),
        "FAULT_CALL": call if call in CALLS else "any",
        "FAULT_ERRNO": str(CALLS.get(call, 0)),
        "FAULT_SIGNAL": str(int(SIGNALS.get(call, 0))),
    }

    def outcome(run: Run, number: int) -> tuple[int, str, int]:
        """Its exit code, what it said, and how many such calls it made (if it was not killed)."""
        count = tmp_path / f"{run.folder.name}.count"
        environment = {"FAULT_FOLDER": str(run.folder), "FAULT_NTH": str(number)}
        with run.start(**environment, **fault, FAULT_COUNT=str(count)) as process:
            assert process.stderr is not None
            said = process.stderr.read().decode()
        return process.returncode, said, int(count.read_text()) if count.exists() else 0

    def fails_and_goes_on(number: int) -> None:
        run = Run(inputs, tmp_path / f"run{number}", calm.options)
        code, said, made = outcome(run, number)
        if code == 3:  # it was quicker, and had fewer commits; or the signal came too late
            assert made < number or (call == "stopped" and number > made - LAST_CALLS), made
        else:
            assert code == (-signal.SIGKILL if call == "killed" else 75) or (
                # The journal (and its folder), rejects or output cannot be opened.
                (code == 2 and (number == 1 or (call == "open" and number <= 4)))
                or (code == 143 and number == 1)  # nothing has begun
            ), said
            assert "Traceback" not in said
            run.finish()
        assert run.result() == expected

    whole = Run(inputs, tmp_path / "whole", calm.options)
    code, said, count = outcome(whole, 0)
    assert code == 3, said
    assert count >= 1
    every: Sequence[int] = range(1, count + 1)
    if call == "stopped":  # at the end it matters where; before, one commit is like another
        every = sorted({*every[::4], *every[-2 * LAST_CALLS :]})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fails_and_goes_on, every))


@pytest.mark.slow
def test_read_error_is_not_a_reject(bundle_folder: Path, tmp_path: Path, faults: Path) -> None:
    """The first look at the inputs reads them for their digests."""
    inputs = write_inputs(tmp_path / "in", 60, random.Random(2))
    calm = Run(inputs, tmp_path / "calm", ("--bundle", str(bundle_folder)))
    calm.finish()
    went_on = 0
    for number in (1, 14, 17):
        run = Run(inputs, tmp_path / f"run{number}", calm.options)
        with run.start(
            LD_PRELOAD=str(faults),
            FAULT_FOLDER=str(tmp_path / "in"),
            FAULT_CALL="read",
            FAULT_NTH=str(number),
            FAULT_ERRNO=str(errno.EIO),
        ) as process:
            assert process.stderr is not None
            said = process.stderr.read().decode()
        assert process.returncode == 4, said
        assert "cannot be read" in said
        assert "Traceback" not in said
        went_on += "to go on: " in said
        run.finish()
        assert run.result() == calm.result()
    assert went_on == 2
