"""What to try next and what it means: configuration, study, recommendation, console."""
