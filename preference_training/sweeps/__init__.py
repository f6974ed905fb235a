"""Many runs from one command line: jobs that run once, side by side, and end early where others are better."""
