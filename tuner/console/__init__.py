"""What the person reads while a run goes on, and at its end."""
