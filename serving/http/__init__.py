"""The service as HTTP: its addresses, the form of its answers, and who may call it."""
