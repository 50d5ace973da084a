"""Public pages: the catalogue of models, comparison, documentation, status, playground and feeds."""
