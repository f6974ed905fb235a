"""Servers as samplers of rounds: what they are asked, and how the weights of the policy get into them."""
