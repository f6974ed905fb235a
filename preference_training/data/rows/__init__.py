"""One row at a time: its fields, its conversation, its prompt and responses, and what is wrong with it."""
