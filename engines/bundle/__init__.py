"""What a bundle is on disk: its manifest, its shapes and its folder."""
