"""What to measure next, from what the measurements so far say."""
