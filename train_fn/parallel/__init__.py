"""What ranks say to each other: sums, votes, and how a trial ends on all of them."""
