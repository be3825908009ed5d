"""Keeps an expert-parallel vLLM deployment serving while ranks die and come back."""

__version__ = "0.1.0"
