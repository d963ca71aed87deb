"""A recommender that answers over HTTP: `app` makes it, `service` decides, `worker` holds the models."""
