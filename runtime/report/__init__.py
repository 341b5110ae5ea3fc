"""What a plan does and costs, told before it is run."""
