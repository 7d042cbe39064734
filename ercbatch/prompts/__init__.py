"""Prompts: their wording, their tokens, the tree of one dialogue, packs of several trees."""
