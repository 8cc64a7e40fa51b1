"""Training: the guard, the losses, and the loop around them."""
