"""The losses: their formulas as pure functions, and objectives that bind the numbers of a run."""
