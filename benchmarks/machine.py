"""What figures were measured on: the machine and the releases, as one JSON line."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from ercbatch.scoring.threads import available_threads

_PACKAGES = ("ercbatch", "onnxruntime", "tokenizers", "numpy", "hnswlib", "torch", "transformers")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
"""Of the processor: those that the speed of int8 products depends on."""


def describe() -> dict[str, Any]:
    """Processor, memory (GB of 10^9 bytes), system, releases, and the day."""
    fields = _first_processor()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": fields.get("model name", platform.machine()),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "cores": available_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": _system(),
        "python": platform.python_version(),
        "versions": _releases(),
    }


def _first_processor() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _system() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    except OSError:
        return platform.platform(terse=True)


def _releases() -> dict[str, str]:
    releases = {}
    for name in _PACKAGES:
        try:
            releases[name] = version(name)
        except PackageNotFoundError:
            continue
    return releases


@click.command()
def main() -> None:
    """Print the machine and the releases."""
    click.echo(json.dumps(describe()))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.machine")
