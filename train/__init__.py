"""LoRA and full-parameter multi-task training of causal language models on dialogues."""

import logging

from ercbatch.scoring.kernels import hide_kernels

hide_kernels()
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it asks for `kernels` on a CPU
