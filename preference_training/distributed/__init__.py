"""Where weights live: launching processes, and placing a model on one device, in shards or with split layers."""
