"""Judges of single responses: who scores what a policy has sampled."""
