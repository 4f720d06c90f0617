"""Updates of a block's parameters in backward, as soon as its gradients are complete."""
