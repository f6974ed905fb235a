"""How weights change: optimizers, float32 master weights, and schedules of the learning rate."""
