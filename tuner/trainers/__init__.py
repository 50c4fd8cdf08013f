"""Other people's trainers: their settings read, and ours written in their words."""
