"""What a run says and keeps while it goes on: metrics, events, dashboards, run files, the margin ledger."""
