"""What a report shows to be read: texts beside the true ones, what features say, and where new items are shown."""
