"""What every training shares: the loop, its state, noise, the teacher, logs."""
