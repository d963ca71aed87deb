"""The commands of stores of features: what is in one, what two say differently, and how one is made or corrected."""
