"""What of a model is trained, and how its embeddings are: chosen weights, noise on embeddings, rows of added tokens."""
