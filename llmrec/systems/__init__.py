"""Published systems, one package each; the core does not import them."""
