"""Saliencies of weights and units compared."""
