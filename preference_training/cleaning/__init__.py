"""Wrong labels: halves of the data that judge each other, and what follows for training and for labelers."""
