"""Pages and tables for people: charts, run report, comparison, flagged pairs, model card, terminal view."""
