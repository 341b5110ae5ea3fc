"""Plans found by what they do to the final latents: key steps by dynamic programming, all else by local search."""
