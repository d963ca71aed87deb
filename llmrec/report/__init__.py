"""Results to one HTML page, Markdown, CSV, LaTeX and console tables."""
