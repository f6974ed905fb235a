"""Training pairs: two halves of them, and weights by their content."""
