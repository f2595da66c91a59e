"""`python -m vtriune.data convert`: datasets as people publish them → rows of this schema. One module for each."""
