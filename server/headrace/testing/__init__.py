"""What tests are made of: tiny checkpoints, a ground truth, and a runner. Imported by tests only."""
