"""What runs on the GPU at hand, and how fast."""
