"""Shared by all engines on an NVIDIA GPU: CUDA graphs, streams and single precision."""
