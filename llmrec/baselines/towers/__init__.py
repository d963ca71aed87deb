"""Models that compare users and items by texts: they know no item by its id."""
