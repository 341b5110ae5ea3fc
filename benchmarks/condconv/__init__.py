"""The cost of conditional convolutions."""
