"""Rows of data files and tables: their fields, conversations, prompts and responses, and errors in them."""
