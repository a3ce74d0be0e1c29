"""Connection pruning on five UCI data sets (Guo, She, Wu, Barbu, Table 3)."""
