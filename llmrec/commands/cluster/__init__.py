"""A job of shards on a cluster: which shards there are, who works them, and how they are put together."""
