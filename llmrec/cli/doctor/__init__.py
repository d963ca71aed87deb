"""The command doctor: what this machine and environment can do."""
