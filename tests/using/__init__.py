"""Using a run that is done: its answers to rows of a file, and conversations with it."""
