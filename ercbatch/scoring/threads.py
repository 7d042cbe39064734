"""Processor threads that this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def available_threads(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """The processors that this process may use: its affinity, and the quotas of its cgroups (v2).

    `membership` says which of `cgroups` the process is in.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = count or 1
    group = ""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            if line.startswith("0::"):
                group = line.removeprefix("0::").strip("/")
    inner = cgroups / group
    for folder in (inner, *inner.parents):
        if not folder.is_relative_to(cgroups):
            break
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                threads = min(threads, max(1, int(quota) // int(period)))
    return threads
