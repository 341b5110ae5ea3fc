"""One segment after another: traced, written, compiled, and what of it need not be done again."""
