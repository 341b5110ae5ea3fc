"""Requests that wait, and the threads that make their pictures: those of one kind at once."""
