"""The recipes: the chosen configuration, run as a complete fine-tune and evaluation."""
