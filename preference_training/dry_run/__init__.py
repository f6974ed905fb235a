"""What a run would do, before it does it: facts of the data, steps, memory, and the cost on many GPUs."""
