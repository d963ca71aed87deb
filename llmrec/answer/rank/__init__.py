"""The command rank: a file of requests to a file of rankings, resumable."""
