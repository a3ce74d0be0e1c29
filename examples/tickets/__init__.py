"""Lottery tickets on MNIST."""
