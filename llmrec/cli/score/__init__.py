"""The command score: ranked lists of any system against what is relevant."""
