"""How much memory a training step takes on each GPU, told before anything is allocated."""
