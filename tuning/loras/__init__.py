"""LoRAs: which weights a file of theirs changes, and how they are added to these."""
