"""Reports on plans before they run: their steps and their cost."""
