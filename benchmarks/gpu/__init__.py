"""The engines on the GPU at hand: which of them run, and how fast."""
