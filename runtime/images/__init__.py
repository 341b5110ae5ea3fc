"""Pictures and noise: reading, writing, initial latents, schedulers."""
