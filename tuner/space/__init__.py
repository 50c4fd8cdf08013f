"""The points of a search, their measurements, and what these prove about memory."""
