"""What the HTTP service does under load."""
