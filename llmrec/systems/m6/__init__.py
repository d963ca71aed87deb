"""M6-Rec: a language model made small for serving, and late interaction over cached segments."""
