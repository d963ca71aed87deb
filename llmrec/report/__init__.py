"""Reports of results as one HTML page, Markdown, CSV, LaTeX and console tables."""
