"""What the measurements mean: one recommendation, and what every alternative lost by."""
