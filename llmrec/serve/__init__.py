"""A recommender over HTTP: the application in `app`, its logic in `service`, and the models in `engine`."""
