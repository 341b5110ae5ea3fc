"""What ``unet-heirloom serve`` takes and does."""
