"""Others' ways to do the same work, to hold ours against."""
