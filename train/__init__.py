"""LoRA and full-parameter multi-task training of causal language models on dialogues."""

from ercbatch.scoring.hidden_kernels import hide_kernels

hide_kernels()
