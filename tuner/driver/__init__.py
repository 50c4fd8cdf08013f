"""The process that you start: flags, checks, the search, and how it is interrupted."""
