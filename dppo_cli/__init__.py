"""Fine-tune language models with Divergence Proximal Policy Optimization."""

__version__ = "0.1.0"
