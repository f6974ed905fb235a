"""The run itself: assembling it, its steps, its optimizer, and the checks that watch it."""
