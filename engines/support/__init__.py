"""Shared by all packages: the form of commands, files that are written whole, cache folders."""
