"""The package `kernels`, hidden: it lets a config run code, or fetches code from the hub.

With it, loading a model can run what its config names (CVE-2026-4372), and on a processor with
AVX512-BF16 the import of bitsandbytes fetches a compiled kernel. Labelling reaches no network and
runs nothing but what was installed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def hide_kernels() -> None:
    """Make `kernels` a package that is not installed, for this process."""
    # Without it, bitsandbytes logs an error when it is imported on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own sign for that


@contextmanager
def hidden_kernels() -> Iterator[None]:
    """Make `kernels` a package that is not installed, in this context."""
    absent = object()
    original: Any = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if original is not absent:
            sys.modules["kernels"] = original
