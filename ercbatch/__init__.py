"""ercbatch: an emotion for every utterance of a conversation, in bulk, offline."""
