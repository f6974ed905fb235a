"""What every other package may use: errors, files and locks, hashes, random streams, process groups, signals, secrets."""
