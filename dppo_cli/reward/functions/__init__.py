"""What runs in the processes of `pool.py` for the built-in rewards. Imports no torch."""
