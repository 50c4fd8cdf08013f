"""What makes the steps of a trial: our own lean trainer, or a training function of yours."""
