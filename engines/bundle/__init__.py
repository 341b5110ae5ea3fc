"""The bundle on disk: its manifest, its shapes and its folder."""
