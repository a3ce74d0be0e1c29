"""The k-dimensional XOR problem of Guo, She, Wu and Barbu: `python -m examples.xor`."""
