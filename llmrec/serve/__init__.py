"""Recommendations over HTTP: the application (`app`), its logic (`service`), and the models (`engine`)."""
