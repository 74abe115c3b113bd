"""The parts that decoders are made of. They know the step and the ops, never devices or files."""
