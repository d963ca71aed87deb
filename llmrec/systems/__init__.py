"""Published systems that need more than a recipe, one package each; the core does not import them."""
