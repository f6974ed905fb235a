"""What a configuration must fulfil beyond the types and ranges of its keys."""
