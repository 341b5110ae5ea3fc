"""What conditional convolutions cost."""
