"""Knowledge of any optimizer: how it steps, by trial, and how it steps on other tensors than its own."""
