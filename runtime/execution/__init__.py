"""Running a schedule on loaded segments: caches, CUDA graphs, swapping."""
