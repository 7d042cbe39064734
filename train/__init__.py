"""LoRA and full-parameter multi-task training of causal language models on dialogues."""
