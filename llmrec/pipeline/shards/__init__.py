"""Jobs that are cut into shards: a folder each, and what is put together again."""
