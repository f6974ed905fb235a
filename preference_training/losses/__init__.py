"""Losses as pure formulas, and objectives that bind the settings of a run."""
