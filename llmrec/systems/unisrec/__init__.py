"""UniSRec: a sequential model that represents items by texts, and can use weights from another data set."""
