"""Answers of models: where they come from, and the code in them."""
