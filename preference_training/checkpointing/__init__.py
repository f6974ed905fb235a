"""Checkpoints: writing them whole, checking what was written, and resuming exactly where a run stopped."""
