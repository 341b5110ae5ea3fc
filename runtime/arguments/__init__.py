"""What a call may be given: the names of options, and their values."""
