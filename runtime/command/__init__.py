"""``python -m runtime``: its arguments, and what it prints and draws."""
