"""What a checkpoint is, what works with it, and what the jobs on it will take."""
