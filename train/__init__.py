"""LoRA and full-parameter multi-task training of causal language models on dialogues."""

import logging

# On a CPU it asks for the package `kernels`, with which a config can run code (CVE-2026-4372).
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
