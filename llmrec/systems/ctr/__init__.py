"""Networks that predict yes or no over fields, with features of language models (KAR) and aligned with texts (CTRL)."""
