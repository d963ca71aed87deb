"""A recommender that answers over HTTP: `app` makes it, `service` decides, `engine` holds the models."""
