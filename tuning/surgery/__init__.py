"""A UNet changed: units removed by a recipe, experts added."""
