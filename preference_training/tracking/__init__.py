"""What a run logs and stores: metrics, events, dashboards, run files, the margin ledger."""
