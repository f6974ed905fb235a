"""The pages of the labeling app."""
