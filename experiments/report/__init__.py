"""The page of a run: whether it learned, whether adaptation helped, on which tasks, and why."""
