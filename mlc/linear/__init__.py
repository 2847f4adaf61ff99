"""Linear systems on flat vectors, by products with the matrix alone: Krylov, Neumann, Nystrom, dense."""
