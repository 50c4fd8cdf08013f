"""What makes the steps of a trial other than our own: a training function of yours."""
