"""How a run's report shows the balance of a mixture of experts."""
