"""Reference fixtures: tiny models with weights computed from their names, and their outputs."""
