"""What the losses' claims come to in worlds whose every response is enumerated: `python benchmarks/science.py`."""
