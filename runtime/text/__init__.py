"""Prompts: tokens, words of textual inversion, and the text encoder's features."""
