"""What pictures are worth: attributes, variants, plans."""
