"""Reports: results as one HTML page, Markdown, CSV, LaTeX and terminal tables."""
