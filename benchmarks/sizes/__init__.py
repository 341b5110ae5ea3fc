"""Stable Diffusion's full size: time, memory and disk."""
