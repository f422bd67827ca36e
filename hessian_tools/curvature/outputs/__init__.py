"""What lies between a model's outputs: distributions of targets, and matrices of the loss."""
