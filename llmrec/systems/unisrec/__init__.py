"""UniSRec: a sequence model that knows items by their texts alone, and can begin with another domain's weights."""
