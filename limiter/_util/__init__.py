"""Mechanisms without a word of this project's domain.

May import: nothing of limiter.
"""
