"""What each removal saves and costs, and a recipe chosen by it."""
