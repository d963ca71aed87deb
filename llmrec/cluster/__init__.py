"""Jobs split into shards, run by hand or on a Ray cluster, and merged."""
