"""CTR prediction networks, optionally with features from language models (KAR) and alignment with texts (CTRL)."""
