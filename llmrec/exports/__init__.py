"""The command export: a run's model as a folder that stands alone."""
