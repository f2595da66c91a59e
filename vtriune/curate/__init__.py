"""`python -m vtriune.curate`: which rows are worth training on, by the rules of the paper and by how hard they turned out to be."""
