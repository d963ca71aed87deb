"""Published systems that are more than a recipe, one package each; the core does not import them."""
