"""CTR prediction networks over fields, with language-model features (KAR) and alignment with texts (CTRL)."""
