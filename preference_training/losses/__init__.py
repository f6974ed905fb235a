"""Losses as pure formulas, and objectives that bind the numbers of a run."""
