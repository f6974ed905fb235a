"""The store: tasks, answers and judgments, in DuckDB."""
