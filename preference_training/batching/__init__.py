"""From tables of token ids to packed micro-batches, in an order that a resumed run goes on with."""
