"""What does not stay on the device: weights, activations and optimizer state, on the host and back."""
