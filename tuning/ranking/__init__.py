"""Each removal's saving and cost, and a recipe chosen by them."""
