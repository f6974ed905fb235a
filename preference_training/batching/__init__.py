"""Packed micro-batches of token ids: tries, packing, and a resumable order of the data."""
