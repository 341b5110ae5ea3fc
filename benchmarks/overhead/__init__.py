"""What this project's own code costs where nothing is computed."""
