"""Calls of Python functions, the user's and our own, in processes that can be killed."""
