"""The pure core: what the controller is made of, one layer or one book each."""
