"""The labeling page: a small web app with one script and one stylesheet."""
