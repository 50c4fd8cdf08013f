"""The built-in demo: its problems, and how it is made."""
