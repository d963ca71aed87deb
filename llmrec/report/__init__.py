"""Results to one HTML page, Markdown, CSV and console tables."""
