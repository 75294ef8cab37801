"""The course's diagrams, drawn by scripts: `python -m tools.diagrams` writes docs/diagrams/*.svg."""
