"""Multiple-choice evaluation, base against tuned."""
