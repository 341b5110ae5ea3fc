"""The embedded model: emoji as training data, its training and its reader."""
