"""Packed micro-batches of token ids: tries, packing, and an order that a resumed run goes on with."""
