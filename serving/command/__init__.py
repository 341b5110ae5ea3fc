"""The command ``unet-heirloom serve``: its arguments, and how it starts and stops."""
