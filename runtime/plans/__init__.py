"""Plans: what is inherited at which step, and what has to run then. No arithmetic."""
