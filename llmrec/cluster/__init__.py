"""Jobs divided into shards, which run by hand or on a Ray cluster and are then merged."""
