"""Views of an answer: text, tables, JSON. A view a file; a view computes nothing."""
