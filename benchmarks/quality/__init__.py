"""The worth of pictures: attributes, variants, plans."""
