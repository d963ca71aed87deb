"""Files of any kind to typed columns."""
