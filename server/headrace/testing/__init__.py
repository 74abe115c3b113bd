"""What tests are made of: tiny checkpoints, a ground truth, a runner. Imported by tests only."""
