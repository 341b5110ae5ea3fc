"""A checkpoint as a graph of units, and the partition of it into segments."""
