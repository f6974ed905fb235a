"""What comes in and goes out: importing tasks and judgments, exporting training data."""
