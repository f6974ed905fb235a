"""Mixtures of experts: what their routers choose, the load-balancing loss, and numbers of the balance."""
