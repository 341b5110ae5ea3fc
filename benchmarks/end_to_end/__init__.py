"""A picture from prompt to pixels: this project's variants, plans and engines, and its peers, in one run."""
