"""The files that a study leaves, and how they are read again."""
