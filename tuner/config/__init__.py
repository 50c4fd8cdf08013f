"""The configuration: its keys, the rules between them, and what follows from it."""
