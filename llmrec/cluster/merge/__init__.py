"""Shards of an evaluation, and the command merge, which puts shards of any command together."""
