"""Whether data is any good: leaks, duplicates, contradictions, labels that a rule predicts, contamination, languages, lengths."""
