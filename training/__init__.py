"""Training and evaluation of the bundled tiny MoE model."""
