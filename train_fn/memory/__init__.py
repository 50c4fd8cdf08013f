"""One worker's memory: what it may hold, what it held, and what an error says about it."""
