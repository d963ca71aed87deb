"""M6-Rec: smaller language models for serving, and late interaction with cached text segments."""
