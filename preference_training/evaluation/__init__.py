"""How good a model is: held-out metrics with intervals, judges and win rates, task suites."""
