"""Whether data is any good: leaks, duplicates, labels that contradict or that a rule predicts, contamination, languages."""
