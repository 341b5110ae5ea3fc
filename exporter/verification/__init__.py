"""A bundle compared with the torch model that it was made from."""
