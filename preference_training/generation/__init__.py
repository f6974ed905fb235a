"""Responses sampled from a model."""
