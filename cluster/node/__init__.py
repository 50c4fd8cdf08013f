"""One node's GPUs: what NVML reads, which are quiet, and what disturbed a trial."""
