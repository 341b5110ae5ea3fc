"""`mini`: rendered scenes, their captions, and the recipe that trains a small SD-1.5-shaped model on them."""
