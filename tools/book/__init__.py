"""The course as a website, made from the repository's own pages: make docs."""
