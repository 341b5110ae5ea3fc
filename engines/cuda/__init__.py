"""What holds for every engine on an NVIDIA GPU: CUDA graphs, streams and single precision."""
