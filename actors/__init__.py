"""What acts: samplers, trainers and parameter syncs, one process each."""
