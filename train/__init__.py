"""LoRA and full-parameter multi-task training of causal language models on dialogues."""

import logging
import sys

# With the package `kernels` a config can run code (CVE-2026-4372), and bitsandbytes, which peft
# imports, fetches some: here it is not there, whether or not it is installed.
sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own sign for that
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # which asks for it on a CPU
