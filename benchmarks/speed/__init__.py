"""How long a step takes, and why."""
