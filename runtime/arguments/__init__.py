"""The arguments of a call: the names of options, and their values."""
