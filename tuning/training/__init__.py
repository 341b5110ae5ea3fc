"""Shared by every training: the loop, its state, noise, the teacher, logs."""
