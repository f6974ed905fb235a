"""Where a run's metrics go besides its own files: a class for each place."""
