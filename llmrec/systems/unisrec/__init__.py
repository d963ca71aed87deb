"""UniSRec: a sequence model that represents items by texts, and can transfer weights from another domain."""
