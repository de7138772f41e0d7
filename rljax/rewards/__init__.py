"""Verifiers, one file each, and the pool of killable workers that runs them."""
