"""What every package shares: the form of commands, files that are written whole, cache folders."""
