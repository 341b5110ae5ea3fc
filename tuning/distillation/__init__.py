"""A smaller UNet taught by its original: losses, data, command."""
